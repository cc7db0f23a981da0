"""What a stage instance will cost, estimated before anything runs.

FLOPs here are multiply-adds counted once, as in torchvision's tables and in all our reports. A device's TFLOP/s, as its
maker states them, count the multiply and the add: a stage takes 2 x multiply-adds / (TFLOP/s x efficiency) seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gowide_dist.insight.assumed import DataSize, decoded_per_s, device_of
from gowide_dist.instances import Instance
from gowide_dist.launch.profile import Device, Resources
from gowide_dist.recipe import Recipe
from gowide_dist.timeline import Batching, Timeline
from gowide_dist.train.costs import memory_per_process, network_cost, stage_cost, training_macs


@dataclass(frozen=True)
class StagePlan:
    """One stage instance. FLOPs are multiply-adds; `hours` of what is left, on `num_processes` processes together."""

    stage: str
    state: str  # to do, done, done in another run, or the step that it resumes from
    epochs: int
    images: int
    steps: int
    steps_left: int
    macs: dict[str, float]  # for a training image: forward, backward, teacher
    total_macs: float  # of the whole stage's training
    validation_s: float  # of one pass
    parameters: int
    memory: dict[str, int]  # bytes of a process, by what needs them
    num_processes: int
    batch_per_process: int
    hours: float
    device_hours: float
    requeues: float | None  # None: it never ends; the hours are without them
    parents: tuple[str, ...]


def plan_stage(
    instance: Instance, recipe: Recipe, size: DataSize, resources: Resources, progress: str | int, teacher_runs: bool
) -> StagePlan:
    """The plan of an instance. progress: where it is done, or the step of its newest checkpoint.

    teacher_runs: False where the teacher's outputs are known. Raises RecipeError if the processes cannot divide the
    global batch.
    """
    epochs, optim = instance.stage.epochs, instance.stage.optim
    device, num_processes = device_of(resources), resources.num_processes[0]
    recipe.check_processes(num_processes)
    batching = Batching(recipe.batch_size, num_processes, accumulate=optim.accumulate if optim else 1)
    timeline = Timeline(batching, size.train // recipe.batch_size, epochs)
    steps, is_done = timeline.total_steps, isinstance(progress, str)
    steps_left = steps - progress if isinstance(progress, int) else 0
    passes = math.ceil((epochs // recipe.eval_every_epochs or 1) * (steps_left / steps if steps else not is_done))
    macs = training_macs(instance, recipe, size.classes, num_images=batching.micro_batch, teacher_runs=teacher_runs)
    validation = stage_cost(instance, recipe, size.classes, num_images=batching.micro_batch).validation
    validation_macs = validation.total if teacher_runs else validation.forward
    validation_s = _seconds(size.val, validation_macs, size, resources, device)
    training_s = _seconds(timeline.images(steps_left), macs.total, size, resources, device)
    work_s = 0.0 if is_done else device.start_s + training_s + passes * validation_s
    every = recipe.checkpoints
    saves = steps_left > (every.every_steps or math.inf) or work_s > 60 * (every.every_minutes or math.inf)
    requeues = restarts(work_s, 60 * resources.timeout_min, resources.signal_delay_s + device.start_s)
    never_ends = math.isinf(requeues)
    hours = (work_s + (0 if never_ends else requeues * device.start_s)) / 3600
    return StagePlan(
        stage=instance.key,
        state=progress if isinstance(progress, str) else f"from step {progress:,}" if progress else "to do",
        epochs=epochs,
        images=timeline.images(steps),
        steps=steps,
        steps_left=steps_left,
        macs=macs._asdict(),
        total_macs=timeline.images(steps) * macs.total,
        validation_s=validation_s,
        parameters=network_cost(instance.architecture, size.classes, recipe.data.resolution).parameters,
        memory=memory_per_process(
            instance, recipe, size.classes, batching, resources.cpus_per_task,
            on_gpu=resources.gpus_per_node > 0, teacher_runs=teacher_runs, saves=saves,
        ),
        num_processes=num_processes,
        batch_per_process=batching.local_batch,
        hours=hours,
        device_hours=hours * num_processes,
        requeues=None if never_ends else requeues,
        parents=instance.parents,
    )  # fmt: skip


def _seconds(images: float, macs: float, size: DataSize, resources: Resources, device: Device) -> float:
    """To decode images and compute `macs` multiply-adds for each. GPUs compute meanwhile, on CPUs the two add up."""
    num_processes = resources.num_processes[0]
    computing = 2 * images * macs / (num_processes * device.flops)
    decoding = images / (num_processes * resources.cpus_per_task * decoded_per_s(size, device))
    return max(computing, decoding) if resources.gpus_per_node else computing + decoding


def restarts(work_s: float, timeout_s: float, lost_s: float) -> float:
    """How often a job of `work_s` is queued again when each allocation ends after `timeout_s` and each restart loses
    `lost_s`: the smallest r with work + r lost <= (r + 1) timeout. Infinite where a restart loses the whole allocation.
    """
    if work_s <= timeout_s:
        return 0
    if lost_s >= timeout_s:
        return math.inf
    return math.ceil((work_s - timeout_s) / (timeout_s - lost_s))
