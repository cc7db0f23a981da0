"""What to think about before a plan's costs are spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gowide_dist.insight.assumed import DataSize, decoded_per_s, device_of
from gowide_dist.insight.costs import training_macs, with_teacher
from gowide_dist.insight.text import duration, gigabytes
from gowide_dist.launch.profile import Device, Profile, Resources
from gowide_dist.recipe import Instance, KlStage, Recipe

if TYPE_CHECKING:
    from gowide_dist.insight.plan import StagePlan

FEW_IMAGES_PER_GPU = 32  # below, GPUs idle and batch norms see few images
STORED_TOP_K = 10  # suggested where there are more than a hundred classes


def warnings_of(
    stage: StagePlan,
    recipe: Recipe,
    size: DataSize,
    resources: Resources,
    device: Device,
    validation_s: float,
    *,
    is_here: bool,
) -> list[str]:
    """What looks wrong with a stage: too small a batch, too little memory, slow data, no checkpoints, short notice."""
    found = []
    memory, on_gpu = stage.memory, bool(resources.gpus_per_node)
    if on_gpu and stage.batch_per_process < FEW_IMAGES_PER_GPU:
        found.append(
            f"{stage.stage}: {recipe.batch_size} images on {stage.num_processes} GPUs are {stage.batch_per_process} "
            f"each, fewer than {FEW_IMAGES_PER_GPU}: they idle, and batch norms see few images; take fewer GPUs or a "
            "larger batch"
        )
    needed = memory.device if on_gpu else sum(memory)
    if device.memory_gb and needed > device.memory_gb * 1e9:
        fixed = needed - memory.activations
        parts = math.ceil(memory.activations / max(1.0, device.memory_gb * 1e9 - fixed))
        teacher = f", {gigabytes(memory.teacher)} of it the teacher's" if memory.teacher else ""
        mend = (
            f"stages.{stage.stage.partition('/')[0]}.optim.accumulate={parts} would do"
            if fixed < device.memory_gb * 1e9
            else "even one image at a time does not fit: take a smaller network or other devices"
        )
        found.append(
            f"{stage.stage}: needs about {gigabytes(needed)} a process{teacher}, but {device.name} has "
            f"{device.memory_gb:,.0f} GB; {mend}"
        )
    eats = device.flops / (2 * stage.macs.total)
    gives = resources.cpus_per_task * decoded_per_s(size, device)
    if on_gpu and eats > gives:
        found.append(
            f"{stage.stage}: a GPU could take {eats:,.0f} images/s, its {resources.cpus_per_task} CPUs decode "
            f"{gives:,.0f}: it will wait for data; ask for more cpus_per_task or encode smaller images (--max-side-px)"
        )
    if is_here:
        return found
    every = recipe.checkpoints
    if stage.requeues:
        unsaved = every.every_steps is None and (
            every.every_minutes is None or every.every_minutes > resources.timeout_min
        )
        if unsaved:
            found.append(
                f"{stage.stage}: takes {duration(stage.hours)}, longer than timeout_min ({resources.timeout_min}), "
                "without checkpoints in between: a node that fails loses all of it; set checkpoints.every_minutes"
            )
        if math.isinf(stage.requeues):
            found.append(f"{stage.stage}: timeout_min is hardly longer than it takes to start: it will never end")
    if validation_s > resources.signal_delay_s:
        found.append(
            f"{stage.stage}: a validation pass takes {validation_s:,.0f} s, longer than signal_delay_s "
            f"({resources.signal_delay_s}): a time limit in it loses what is not saved; raise signal_delay_s"
        )
    return found


def notes_on_stored_logits(
    recipe: Recipe, stages: Sequence[StagePlan], size: DataSize, profile: Profile | None, here: Resources
) -> list[str]:
    """Where several students ask one teacher about the same stream: what storing its answers would save."""
    groups: dict[tuple[Any, ...], list[StagePlan]] = {}
    for planned in stages:
        if isinstance(recipe.instances[planned.stage].stage, KlStage) and planned.epochs:
            groups.setdefault(stream_of(recipe.instances[planned.stage]), []).append(planned)
    found = []
    for students in groups.values():
        instance = recipe.instances[students[0].stage]
        stage = instance.stage
        assert isinstance(stage, KlStage)
        resources = profile.resources(instance) if profile else here
        device = device_of(resources, profile is not None)
        macs = training_macs(with_teacher(instance), recipe, size.classes)
        images, count = students[0].images, len(students)
        once = images * 2 * macs.teacher / device.flops / 3600
        top_k = stage.top_k or (STORED_TOP_K if stage.teacher_logits == "live" and size.classes > 100 else None)
        row = 2 * (top_k + 1) + (2 if size.classes <= 2**15 else 4) * top_k if top_k else 2 * size.classes
        kept = f"{top_k} best" if top_k else f"all {size.classes}"
        rows = f"{stage.epochs} epochs x {images // stage.epochs:,} images x {row} bytes"
        file = f"{gigabytes(images * row)} ({rows}, {kept} classes)"
        names = ", ".join(student.stage for student in students)
        if stage.teacher_logits == "stored":
            found.append(
                f"{names}: {instance.teacher}'s answers are stored once, {file}; "
                f"that saves {duration((count - 1) * once)} of {duration(count * once)} on all devices"
            )
        else:
            all_of_it = duration(count * once)
            saved = f"{duration((count - 1) * once)} of {all_of_it} on all devices" if count > 1 else "nothing yet"
            found.append(
                f"{names}: {macs.teacher / macs.total:.0%} of a step is {instance.teacher}'s answers; "
                f"teacher_logits: stored would save {saved}, {duration(once)} for each further student or seed of the "
                f"same stream, for {file}"
            )
    return found


def stream_of(instance: Instance) -> tuple[Any, ...]:
    """Equal for stages that ask one teacher about the same images, and keep as much of its answers."""
    stage = instance.stage
    kept = (stage.top_k, stage.temperature if stage.top_k else None) if isinstance(stage, KlStage) else ()
    return (stage.objective, instance.teacher, instance.data_seed, stage.epochs, stage.ramp, *kept)
