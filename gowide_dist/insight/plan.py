"""What a recipe will cost, before anything is spent, and what looks wrong with it.

FLOPs here are multiply-adds counted once, as in torchvision's tables and in all our reports. A device's TFLOP/s, as its
maker states them, count the multiply and the add: a stage takes 2 x multiply-adds / (TFLOP/s x efficiency) seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gowide_dist.errors import DataError
from gowide_dist.identity import fingerprint, identities
from gowide_dist.insight.assumed import NO_LIMIT, DataSize, data_size, decoded_per_s, device_of, this_machines_cores
from gowide_dist.insight.costs import (
    HEAP_WASTE,
    MacsPerImage,
    Memory,
    memory_per_process,
    network_cost,
    stage_cost,
    training_macs,
)
from gowide_dist.insight.stored import known_outputs, notes
from gowide_dist.insight.text import duration, gigabytes, listed
from gowide_dist.insight.text import table as text_table
from gowide_dist.launch.profile import Device, Profile, Resources
from gowide_dist.prepare import Prepared, check_data, sibling
from gowide_dist.recipe import Instance, Recipe
from gowide_dist.run import Run, StageDir
from gowide_dist.timeline import Batching, Timeline

if TYPE_CHECKING:
    from gowide_dist.insight.timing import Measured

FEW_IMAGES_PER_GPU = 32  # below, GPUs idle and batch norms see few images


@dataclass(frozen=True)
class StagePlan:
    """One stage instance. FLOPs are multiply-adds; `hours` of what is left, on `num_processes` processes together."""

    stage: str
    state: str  # to do, done, done in another run, or the step that it goes on from
    epochs: int
    images: int
    steps: int
    steps_left: int
    macs: MacsPerImage
    total_macs: float  # of the whole stage's training
    validation_macs: float  # of all validation passes that are left
    validation_s: float  # of one pass
    parameters: int
    memory: Memory
    num_processes: int
    batch_per_process: int
    hours: float
    device_hours: float
    requeues: float
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The stages, parents first, what was assumed, and what to think about before it is spent."""

    recipe: str
    data: DataSize
    assumptions: dict[str, str]
    stages: list[StagePlan]
    start_hours: float  # once, of a run on this machine
    longest_path: list[str]
    longest_hours: float
    warnings: list[str]
    notes: list[str]

    @property
    def hours(self) -> float:
        """One stage after the other."""
        return sum(stage.hours for stage in self.stages) + self.start_hours

    @property
    def device_hours(self) -> float:
        return sum(stage.device_hours for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """As data. `macs`: multiply-adds for a training image."""
        stages = [
            {
                **asdict(stage),
                "macs": stage.macs._asdict(),
                "memory": {**stage.memory._asdict(), "total": sum(stage.memory)},
                "requeues": stage.requeues if math.isfinite(stage.requeues) else None,
            }
            for stage in self.stages
        ]
        return {
            **asdict(self),
            "data": self.data._asdict(),
            "stages": stages,
            "hours": self.hours,
            "device_hours": self.device_hours,
            "longest_path": {"stages": self.longest_path, "hours": self.longest_hours},
        }


def plan(
    recipe: Recipe,
    runs: Path,
    *,
    profile: Profile | None = None,
    num_processes: int = 1,
    images: int | None = None,
    classes: int | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Plan a recipe on a cluster, or without a profile in `num_processes` processes on this machine.

    images and classes: of the data, where it is not encoded yet. Raises UserError if recipe, data and profile do not
    fit, writes nothing.
    """
    size = data_size(recipe, images, classes)
    if size.train < recipe.batch_size:
        raise DataError(f"batch_size: {recipe.batch_size} is more than the {size.train:,} training images")
    progress = _progress(recipe, runs) if images is None else {}
    known = known_outputs(recipe, progress, together=profile is None)
    profile = profile or this_machines_cores(num_processes)
    stages: list[StagePlan] = []
    warnings: list[str] = []
    for key, instance in recipe.instances.items():
        resources = profile.resources(instance)
        device = measured.device(instance, recipe, device_of(resources)) if measured else device_of(resources)
        stage = _plan_stage(instance, recipe, size, resources, device, progress.get(key, 0), key not in known)
        stages.append(stage)
        if stage.steps_left:
            warnings += _warnings(stage, recipe, resources, device, decoded_per_s(size, device))
    path, hours = longest_path(
        {stage.stage: stage.hours for stage in stages}, {stage.stage: stage.parents for stage in stages}
    )
    return Plan(
        recipe=recipe.name,
        data=size,
        assumptions=_assumptions(recipe, size, profile, is_measured=measured is not None),
        stages=stages,
        start_hours=measured.start_seconds / 3600 if measured else 0.0,
        longest_path=path,
        longest_hours=hours,
        warnings=warnings,
        notes=list(notes(recipe, size, profile)),
    )


def restarts(work_s: float, timeout_s: float, lost_s: float) -> float:
    """How often a job of `work_s` is queued again when each allocation ends after `timeout_s` and each restart loses
    `lost_s`: the smallest r with work + r lost <= (r + 1) timeout. Infinite where a restart loses the whole allocation.
    """
    if work_s <= timeout_s:
        return 0
    if lost_s >= timeout_s:
        return math.inf
    return math.ceil((work_s - timeout_s) / (timeout_s - lost_s))


def longest_path(lengths: Mapping[str, float], parents: Mapping[str, Sequence[str]]) -> tuple[list[str], float]:
    """The path through the graph that takes longest, and its length. Keys: parents before children."""
    best: dict[str, tuple[list[str], float]] = {}
    for key, length in lengths.items():
        before = [best[parent] for parent in parents[key] if parent in best]
        path, so_far = max(before, key=lambda entry: entry[1], default=([], 0.0))
        best[key] = [*path, key], so_far + length
    return max(best.values(), key=lambda entry: entry[1], default=([], 0.0))


def _progress(recipe: Recipe, runs: Path) -> dict[str, str | int]:
    """Of instances of this recipe that have begun: where they are done, or the step of their newest checkpoint."""
    try:
        checked, checksums = check_data(recipe)
    except DataError:
        return {}
    run = Run(runs / recipe.name)
    prepared = Prepared(checked, run, recipe.instances, identities(checked, checksums))
    progress: dict[str, str | int] = {}
    for key, instance in recipe.instances.items():
        own = fingerprint(prepared.identities[key])
        if run.stage(key).is_done(own):
            progress[key] = "done"
        elif other := sibling(instance, prepared):
            progress[key] = f"done in {other.path.parents[2]}"
        elif step := _saved_step(run.stage(key), own):
            progress[key] = step
    return progress


def _saved_step(stage_dir: StageDir, own: str) -> int:
    """The step of the newest checkpoint of the training with this fingerprint, else 0."""
    for path in sorted(stage_dir.checkpoints.glob("step-*.json"), reverse=True):
        try:
            metadata = json.loads(path.read_text())
            return int(metadata["step"]) if metadata["fingerprint"] == own else 0
        except (OSError, ValueError, KeyError):
            continue
    return 0


def _plan_stage(
    instance: Instance,
    recipe: Recipe,
    size: DataSize,
    resources: Resources,
    device: Device,
    progress: str | int,
    teacher_runs: bool,
) -> StagePlan:
    num_processes, epochs, optim = resources.num_processes[0], instance.stage.epochs, instance.stage.optim
    recipe.check_processes(num_processes)
    batching = Batching(recipe.batch_size, num_processes, accumulate=optim.accumulate if optim else 1)
    timeline = Timeline(batching, size.train // recipe.batch_size, epochs)
    steps, is_done = timeline.total_steps, isinstance(progress, str)
    steps_left = steps - progress if isinstance(progress, int) else 0
    passes = math.ceil((epochs // recipe.eval_every_epochs or 1) * (steps_left / steps if steps else not is_done))
    micro_batch = batching.micro_batch
    macs = training_macs(instance, recipe, size.classes, num_images=micro_batch, teacher_runs=teacher_runs)
    validation = stage_cost(instance, recipe, size.classes, num_images=micro_batch).validation
    one_pass = size.val * (validation.total if teacher_runs else validation.student)
    validation_s = _seconds(size.val, one_pass, size, resources, device)
    seconds = _seconds(timeline.images(steps_left), timeline.images(steps_left) * macs.total, size, resources, device)
    work_s = 0.0 if is_done else device.start_s + seconds + passes * validation_s
    every = recipe.checkpoints
    saves = steps_left > (every.every_steps or math.inf) or work_s > 60 * (every.every_minutes or math.inf)
    requeues = restarts(work_s, 60 * resources.timeout_min, resources.signal_delay_s + device.start_s)
    hours = (work_s + (requeues and requeues * device.start_s)) / 3600
    return StagePlan(
        stage=instance.key,
        state=progress if isinstance(progress, str) else f"from step {progress:,}" if progress else "to do",
        epochs=epochs,
        images=timeline.images(steps),
        steps=steps,
        steps_left=steps_left,
        macs=macs,
        total_macs=timeline.images(steps) * macs.total,
        validation_macs=passes * one_pass,
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
        requeues=requeues,
        parents=instance.parents,
    )  # fmt: skip


def _seconds(images: float, macs: float, size: DataSize, resources: Resources, device: Device) -> float:
    """To decode `images` images and compute `macs` multiply-adds. GPUs compute meanwhile, on CPUs the two add up."""
    num_processes = resources.num_processes[0]
    computing = 2 * macs / (num_processes * device.flops)
    decoding = images / (num_processes * resources.cpus_per_task * decoded_per_s(size, device))
    return max(computing, decoding) if resources.gpus_per_node else computing + decoding


def _warnings(
    stage: StagePlan, recipe: Recipe, resources: Resources, device: Device, decoded_per_cpu: float
) -> Iterator[str]:
    """What looks wrong with a stage: too small a batch, too little memory, slow data, no checkpoints, short notice."""
    key, saves = stage.stage, recipe.checkpoints
    if resources.gpus_per_node:
        yield from _gpu_warnings(stage, recipe, resources, device.flops / (2 * stage.macs.total), decoded_per_cpu)
    yield from _memory_warnings(stage, device, on_gpu=resources.gpus_per_node > 0)
    if stage.requeues and not saves.every_steps and (saves.every_minutes or math.inf) > resources.timeout_min:
        yield (
            f"{key}: takes {duration(stage.hours)}, longer than timeout_min ({resources.timeout_min}), "
            "without checkpoints in between: a node that fails loses all of it; set checkpoints.every_minutes"
        )
    if math.isinf(stage.requeues):
        yield f"{key}: timeout_min is hardly longer than it takes to start: it will never end"
    if stage.validation_s > resources.signal_delay_s:
        yield (
            f"{key}: a validation pass takes {stage.validation_s:,.0f} s, longer than signal_delay_s "
            f"({resources.signal_delay_s}): a time limit in it loses what is not saved; raise signal_delay_s"
        )


def _gpu_warnings(
    stage: StagePlan, recipe: Recipe, resources: Resources, images_per_s: float, decoded_per_cpu: float
) -> Iterator[str]:
    cpus = resources.cpus_per_task
    if stage.batch_per_process < FEW_IMAGES_PER_GPU:
        yield (
            f"{stage.stage}: {recipe.batch_size} images on {stage.num_processes} GPUs are {stage.batch_per_process} "
            f"each, fewer than {FEW_IMAGES_PER_GPU}: they idle, and batch norms see few images; take fewer GPUs or a "
            "larger batch"
        )
    if images_per_s > cpus * decoded_per_cpu:
        yield (
            f"{stage.stage}: a GPU could take {images_per_s:,.0f} images/s, its {cpus} CPUs decode "
            f"{cpus * decoded_per_cpu:,.0f}: it will wait for data; ask for more cpus_per_task or encode smaller "
            "images (--max-side-px)"
        )


def _memory_warnings(stage: StagePlan, device: Device, *, on_gpu: bool) -> Iterator[str]:
    memory, limit = stage.memory, (device.memory_gb or math.inf) * 1e9
    needed = memory.device if on_gpu else sum(memory)
    if needed <= limit:
        return
    of_micro_batch = (memory.activations + memory.transient) * (1 if on_gpu else 1 + HEAP_WASTE)
    left = limit - needed + of_micro_batch
    remedy = "even one image at a time does not fit: take a smaller network or other devices"
    if left > 0:
        parts = math.ceil(of_micro_batch / left)
        remedy = f"stages.{stage.stage.partition('/')[0]}.optim.accumulate={parts} would do"
    teacher = f", {gigabytes(memory.teacher)} of it the teacher's" if memory.teacher else ""
    yield (
        f"{stage.stage}: needs about {gigabytes(needed)} a process{teacher}, but {device.name} has "
        f"{device.memory_gb:,.0f} GB; {remedy}"
    )


def _assumptions(recipe: Recipe, size: DataSize, profile: Profile, *, is_measured: bool) -> dict[str, str]:
    device, is_cluster = device_of(profile), profile.timeout_min < NO_LIMIT
    data = f"{size.train:,} training and {size.val:,} validation images in {size.classes} classes ({size.source})"
    lines = {"data": data, "FLOPs": "multiply-adds counted once, by PyTorch; a device's TFLOP/s count both"}
    if is_measured:
        lines["time"] = (
            f"FLOP/s of a few steps of each stage, measured now in {profile.tasks_per_node} processes; other phases, "
            "image sizes and validation by their FLOPs; start of the run and of its stages included once"
        )
    else:
        whence = "cluster profile" if is_cluster and profile.device else "assumed; small networks reach less"
        lines["time"] = (
            f"{device.name}: {device.tflops:g} TFLOP/s x {device.efficiency:g} reached = {device.flops / 1e12:.3g} "
            f"TFLOP/s a process ({whence}); validation passes included"
        )
        if math.isfinite(decoded_per_s(size, device)):
            lines["data loading"] = f"{decoded_per_s(size, device):,.0f} images/s and CPU"
        if is_cluster:
            lines["jobs"] = (
                f"{device.start_s:g} s to start; limit {profile.timeout_min / 60:g} hours; a job that meets it saves, "
                "is queued again and goes on; waiting in the queue is not counted"
            )
    halves = "" if recipe.precision == "float32" else f", half of it in {recipe.precision}"
    waste = "" if profile.gpus_per_node else f"; {HEAP_WASTE:.0%} more, which malloc wastes"
    lines["memory"] = (
        f"4 bytes a weight, gradient, momentum and average; what a step keeps and takes for a moment{halves}; the "
        f"teacher's weights{waste}; loader's batches; a checkpoint being written; 0.6 GB of libraries; without the "
        "dataset's pages that the system caches"
    )
    return lines


def table(plan: Plan) -> str:
    """The plan as lines of text."""
    head = ("stage", "state", "epochs", "steps", "forward", "backward", "teacher", "TFLOPs", "parameters", "GB/process",
            "processes", "batch", "time", "device time", "requeues")  # fmt: skip
    rows = [
        (
            stage.stage, stage.state, str(stage.epochs), f"{stage.steps:,}",
            *(f"{macs / 1e6:,.3f}".rstrip("0").rstrip(".") for macs in stage.macs),
            f"{stage.total_macs / 1e12:,.2f}", f"{stage.parameters:,}", f"{sum(stage.memory) / 1e9:.2f}",
            str(stage.num_processes), str(stage.batch_per_process), duration(stage.hours),
            duration(stage.device_hours), f"{stage.requeues:g}",
        )
        for stage in plan.stages
    ]  # fmt: skip
    start = ", the start of the run included" if plan.start_hours else ""
    return "\n".join(
        [
            f"{plan.recipe}: forward, backward and teacher in MFLOPs for a training image; time of what is left",
            f"{text_table(head, rows, left=(0, 1))}\n",
            f"one after the other: {duration(plan.hours)}{start}; on all devices: {duration(plan.device_hours)}",
            f"longest path: {duration(plan.longest_hours)}, {' -> '.join(plan.longest_path)}",
            listed(plan.assumptions),
            *(f"warning: {line}" for line in plan.warnings),
            *(f"note: {line}" for line in plan.notes),
        ]
    )
