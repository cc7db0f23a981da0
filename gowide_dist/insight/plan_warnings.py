"""What looks wrong with the stages of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gowide_dist.insight.assumed import DataSize, decoded_per_s, device_of
from gowide_dist.insight.stage_plan import StagePlan
from gowide_dist.insight.text import duration, gigabytes
from gowide_dist.launch.profile import Resources
from gowide_dist.recipe import Recipe
from gowide_dist.train.costs import HOST_PARTS, memory_together

FEW_IMAGES_PER_GPU = 32  # below, GPUs idle and batch norms see few images


def stage_warnings(stage: StagePlan, recipe: Recipe, size: DataSize, resources: Resources) -> Iterator[str]:
    """What looks wrong with a stage: too small a batch, slow data, no checkpoints, short notice."""
    key, device, on_gpu = stage.stage, device_of(resources), resources.gpus_per_node > 0
    if on_gpu and stage.batch_per_process < FEW_IMAGES_PER_GPU:
        yield (
            f"{key}: {recipe.batch_size} images on {stage.num_processes} GPUs are {stage.batch_per_process} per "
            f"GPU, fewer than {FEW_IMAGES_PER_GPU}: GPUs idle, and batch norms see few images; use fewer GPUs or a "
            "larger batch"
        )
    cpus, images_per_s = resources.cpus_per_task, device.flops / (2 * sum(stage.macs.values()))
    if on_gpu and images_per_s > cpus * decoded_per_s(size, device):
        yield (
            f"{key}: a GPU could take {images_per_s:,.0f} images/s, its {cpus} CPUs decode "
            f"{cpus * decoded_per_s(size, device):,.0f}: it will wait for data; raise cpus_per_task or encode "
            "smaller images (--max-side-px)"
        )
    saves = recipe.checkpoints
    if stage.requeues != 0 and not saves.every_steps and (saves.every_minutes or math.inf) > resources.timeout_min:
        yield (
            f"{key}: takes {duration(stage.hours)}, longer than timeout_min ({resources.timeout_min}), without "
            "periodic checkpoints: a node failure loses all of it; set checkpoints.every_minutes"
        )
    if stage.requeues is None:
        yield f"{key}: it cannot finish: timeout_min leaves hardly any time after starting up; raise it"
    if stage.validation_s > resources.signal_delay_s:
        yield (
            f"{key}: a validation pass takes {stage.validation_s:,.0f} s, longer than signal_delay_s "
            f"({resources.signal_delay_s}): a time limit during it loses the steps since the last checkpoint; raise "
            "signal_delay_s"
        )


def memory_warning(stages: Sequence[StagePlan], resources: Resources) -> Iterator[str]:
    """Whether the stage instances of one job need more memory than a process has."""
    device, on_gpu = device_of(resources), resources.gpus_per_node > 0
    memory = memory_together([stage.memory for stage in stages])
    needed = sum(num_bytes for part, num_bytes in memory.items() if not on_gpu or part not in HOST_PARTS)
    if not device.memory_gb or needed <= 1e9 * device.memory_gb:
        return
    of_batch = sum(memory[part] for part in ("activations", "transient", "heap"))
    left = 1e9 * device.memory_gb - needed + of_batch
    stage_name = stages[0].stage.partition("/")[0]
    advice = "even one image at a time does not fit: use a smaller network or other devices"
    if left > 0:
        advice = f"stages.{stage_name}.optim.accumulate={math.ceil(of_batch / left)} would do"
    teacher = f", {gigabytes(memory['teacher'])} of it the teacher's" if memory["teacher"] else ""
    networks = ", ".join(stage.stage for stage in stages)
    apart = "; or train the networks one by one: together: false, or --sequential" if len(stages) > 1 else ""
    yield (
        f"{networks}: {'need' if len(stages) > 1 else 'needs'} about {gigabytes(needed)} per process{teacher}, but "
        f"{device.name} has {device.memory_gb:,.0f} GB; {advice}{apart}"
    )
