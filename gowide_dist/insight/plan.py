"""What a recipe will cost, before anything is spent. Imports no torch: it runs on a login node.

FLOPs here are multiply-adds counted once, as in torchvision's tables and in all our reports. A device's TFLOP/s, as its
maker states them, count the multiply and the add: a stage takes 2 x multiply-adds / (TFLOP/s x efficiency) seconds.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gowide_dist.errors import DataError
from gowide_dist.identity import fingerprint, identities
from gowide_dist.insight.advice import notes_on_stored_logits, stream_of, warnings_of
from gowide_dist.insight.assumed import DataSize, cores_here, data_size, decoded_per_s, device_of
from gowide_dist.insight.costs import (
    MacsPerImage,
    Memory,
    memory_per_process,
    training_macs,
    validation_macs,
    with_teacher,
    without_teacher,
)
from gowide_dist.insight.simulate import longest_path, restarts
from gowide_dist.insight.text import columns, duration, listed
from gowide_dist.launch.profile import Device, Profile, Resources
from gowide_dist.prepare import Prepared, check_data, sibling
from gowide_dist.recipe import Instance, KlStage, Recipe
from gowide_dist.run import Run, StageDir

if TYPE_CHECKING:
    from gowide_dist.insight.measure import Measured


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
    validation_macs: float  # of all validation passes that are left
    parameters: int
    memory: Memory
    num_processes: int
    batch_per_process: int
    hours: float
    device_hours: float
    requeues: float
    parents: tuple[str, ...]

    @property
    def total_macs(self) -> float:
        """Of the whole stage's training."""
        return self.images * self.macs.total


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
        """Of all stages."""
        return sum(stage.device_hours for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """As data. `macs`: multiply-adds for a training image."""
        stages = [
            {
                **asdict(stage),
                "macs": stage.macs._asdict(),
                "total_macs": stage.total_macs,
                "memory": {**stage.memory._asdict(), "total": sum(stage.memory)},
                "requeues": stage.requeues if math.isfinite(stage.requeues) else None,
            }
            for stage in self.stages
        ]
        return {
            "recipe": self.recipe,
            "data": self.data._asdict(),
            "assumptions": self.assumptions,
            "stages": stages,
            "hours": self.hours,
            "start_hours": self.start_hours,
            "device_hours": self.device_hours,
            "longest_path": {"stages": self.longest_path, "hours": self.longest_hours},
            "warnings": self.warnings,
            "notes": self.notes,
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
    here = cores_here(num_processes)
    fed: set[str] = set() if profile else _fed_along(recipe, progress)
    stages = []
    warnings: list[str] = []
    stored = {stream_of(recipe.instances[key]) for key, state in progress.items() if isinstance(state, str)}
    for instance in recipe.instances.values():
        if isinstance(instance.stage, KlStage) and instance.stage.teacher_logits == "stored":
            stream = stream_of(instance)
            instance = without_teacher(instance) if stream in stored else with_teacher(instance)
            stored.add(stream)
        resources = profile.resources(instance) if profile else here
        device = device_of(resources, profile is not None)
        state = progress.get(instance.key)
        stage = _plan_stage(instance, recipe, size, resources, device, state, measured, is_fed=instance.key in fed)
        stages.append(stage)
        if stage.steps_left:
            validation_s = _validation_seconds(instance, recipe, size, stage, device, measured)
            warnings += warnings_of(stage, recipe, size, resources, device, validation_s, is_here=profile is None)
    parents = {stage.stage: stage.parents for stage in stages}
    path, hours = longest_path({stage.stage: stage.hours for stage in stages}, parents)
    return Plan(
        recipe.name,
        size,
        _assumptions(recipe, size, profile, here, measured),
        stages,
        measured.start_seconds / 3600 if measured else 0.0,
        path,
        hours,
        warnings,
        notes_on_stored_logits(recipe, stages, size, profile, here),
    )


def _progress(recipe: Recipe, runs: Path) -> dict[str, str | int]:
    """Of stages of this recipe that have begun: where they are done, or the step of their newest checkpoint."""
    try:
        checked, checksums = check_data(recipe)
    except DataError:
        return {}
    run = Run(runs / recipe.name)
    prepared = Prepared(checked, run, recipe.instances, identities(checked, checksums))
    found: dict[str, str | int] = {}
    for key, instance in recipe.instances.items():
        mine = fingerprint(prepared.identities[key])
        if run.stage(key).is_done(mine):
            found[key] = "done"
        elif there := sibling(instance, prepared):
            found[key] = f"done in {there.path.parents[2]}"
        elif step := _saved_step(run.stage(key), mine):
            found[key] = step
    return found


def _fed_along(recipe: Recipe, progress: dict[str, str | int]) -> set[str]:
    """Instances that `gowide run` trains in one pass with another of their stage, which has asked the teacher."""
    to_do = [instance for instance in recipe.instances.values() if not isinstance(progress.get(instance.key), str)]
    first = {instance.stage_name: instance.key for instance in reversed(to_do)}
    return {instance.key for instance in to_do if first[instance.stage_name] != instance.key}


def _saved_step(place: StageDir, mine: str) -> int:
    """The step of the newest checkpoint of this very training, else 0."""
    for about in sorted(place.checkpoints.glob("step-*.json"), reverse=True):
        try:
            said = json.loads(about.read_text())
            return int(said["step"]) if said["fingerprint"] == mine else 0
        except (OSError, ValueError, KeyError):
            continue
    return 0


def _plan_stage(
    instance: Instance,
    recipe: Recipe,
    size: DataSize,
    resources: Resources,
    device: Device,
    progress: str | int | None,
    measured: Measured | None,
    *,
    is_fed: bool,
) -> StagePlan:
    """is_fed: the teacher answers another student of the stage anyway."""
    num_processes = resources.num_processes[0]
    recipe.check_processes(num_processes)
    share = recipe.batch_size // num_processes
    epochs = instance.stage.epochs
    steps = size.train // recipe.batch_size * epochs
    is_done = isinstance(progress, str)
    left = 0 if is_done else steps - (progress if isinstance(progress, int) else 0)
    evaluations = (
        0 if is_done else math.ceil((epochs // recipe.eval_every_epochs or 1) * (left / steps if steps else 1))
    )
    macs = training_macs(instance, recipe, size.classes)
    if is_fed:
        macs = macs._replace(teacher=0.0)
    one_pass = size.val * validation_macs(instance, recipe, size.classes)
    if measured and not is_done:
        seconds = _measured_seconds(instance, recipe, size, num_processes, left, evaluations, measured)
    else:
        images = left * recipe.batch_size
        seconds = _seconds(images, macs.total, size, resources, device) + _seconds(
            evaluations * size.val, one_pass / max(1, size.val), size, resources, device
        )
    start = 0.0 if is_done or measured else device.start_s
    timeout = 60 * resources.timeout_min
    again = 0.0 if is_done else restarts(start + seconds, timeout, resources.signal_delay_s + device.start_s)
    hours = (start + seconds + (again and again * device.start_s)) / 3600
    return StagePlan(
        stage=instance.key,
        state=progress if isinstance(progress, str) else f"from step {progress:,}" if progress else "to do",
        epochs=epochs,
        images=steps * recipe.batch_size,
        steps=steps,
        steps_left=left,
        macs=macs,
        validation_macs=evaluations * one_pass,
        parameters=instance.architecture.num_parameters(size.classes),
        memory=memory_per_process(instance, recipe, size.classes, share, resources.cpus_per_task),
        num_processes=num_processes,
        batch_per_process=share,
        hours=hours,
        device_hours=hours * num_processes,
        requeues=again,
        parents=recipe.instances[instance.key].parents,
    )


def _seconds(images: float, macs: float, size: DataSize, resources: Resources, device: Device) -> float:
    """To run the processes' networks over so many images at so many multiply-adds each.

    GPUs compute while CPUs decode; on CPUs the two add up.
    """
    num_processes = resources.num_processes[0]
    computing = images * 2 * macs / (num_processes * device.flops)
    decoding = images / (num_processes * resources.cpus_per_task * decoded_per_s(size, device))
    return max(computing, decoding) if resources.gpus_per_node else computing + decoding


def _measured_seconds(
    instance: Instance,
    recipe: Recipe,
    size: DataSize,
    num_processes: int,
    steps: int,
    evaluations: int,
    measured: Measured,
) -> float:
    """What `done.json` will say: training, validation passes, checkpoints, and what comes once."""
    if not instance.stage.epochs:
        return 0.0
    timing = measured.timing(instance, recipe)
    step = timing.step
    if instance.stage.ramp:  # measured at full size
        plain = instance._replace(stage=instance.stage.model_copy(update={"ramp": None}))
        step *= training_macs(instance, recipe, size.classes).total / training_macs(plain, recipe, size.classes).total
    share = recipe.batch_size // num_processes
    batches = math.ceil(math.ceil(size.val / num_processes) / share)
    seconds = timing.fixed + steps * step + evaluations * batches * timing.validation
    every = recipe.checkpoints
    saves = seconds // (60 * every.every_minutes) if every.every_minutes else 0
    saves += steps // every.every_steps if every.every_steps else 0
    return seconds + saves * timing.save


def _validation_seconds(
    instance: Instance, recipe: Recipe, size: DataSize, stage: StagePlan, device: Device, measured: Measured | None
) -> float:
    """Of one validation pass."""
    if measured:
        batches = math.ceil(size.val / recipe.batch_size)
        return batches * measured.timing(instance, recipe).validation
    macs = size.val * validation_macs(instance, recipe, size.classes)
    return 2 * macs / (stage.num_processes * device.flops)


def _assumptions(
    recipe: Recipe, size: DataSize, profile: Profile | None, here: Resources, measured: Measured | None
) -> dict[str, str]:
    resources = profile or here
    device = device_of(resources, profile is not None)
    data = f"{size.train:,} training and {size.val:,} validation images in {size.classes} classes ({size.source})"
    lines = {"data": data, "FLOPs": "multiply-adds counted once; backward = 2 x forward; a device's TFLOP/s count both"}
    if measured:
        lines["time"] = f"measured here just now, in {here.tasks_per_node} processes; start of the run included once"
    else:
        whence = "cluster profile" if profile and profile.device else "assumed; small networks reach less"
        lines["time"] = (
            f"{device.name}: {device.tflops:g} TFLOP/s x {device.efficiency:g} reached = {device.flops / 1e12:.3g} "
            f"TFLOP/s a process ({whence}); validation passes included"
        )
        if math.isfinite(decoded_per_s(size, device)):
            lines["data loading"] = f"{decoded_per_s(size, device):,.0f} images/s and CPU"
        if profile:
            lines["jobs"] = (
                f"{device.start_s:g} s to start; limit {profile.timeout_min / 60:g} hours; a job that meets it saves, "
                "is queued again and goes on; waiting in the queue is not counted"
            )
    size_of = "4" if recipe.precision == "float32" else "2"
    lines["memory"] = (
        f"4 bytes a weight, gradient, momentum and average; activations {size_of} bytes x 2 x outputs of the "
        "convolutions x images at a time; teacher's weights and largest outputs; loader's batches; 0.5 GB of libraries"
    )
    return lines


def table(plan: Plan) -> str:
    """The plan as lines of text."""
    head = ("stage", "state", "epochs", "steps", "forward", "backward", "teacher", "TFLOPs", "parameters", "GB/process",
            "processes", "batch", "time", "device time", "requeues")  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for stage in plan.stages:
        flops = (f"{macs / 1e6:,.3f}".rstrip("0").rstrip(".") for macs in stage.macs)
        lines.append(
            (
                stage.stage, stage.state, str(stage.epochs), f"{stage.steps:,}", *flops,
                f"{stage.total_macs / 1e12:,.2f}", f"{stage.parameters:,}", f"{sum(stage.memory) / 1e9:.2f}",
                str(stage.num_processes), str(stage.batch_per_process), duration(stage.hours),
                duration(stage.device_hours), f"{stage.requeues:g}",
            )
        )  # fmt: skip
    text = f"{plan.recipe}: forward, backward and teacher in MFLOPs for a training image; time of what is left\n"
    text += f"{columns(lines, left=(0, 1))}\n\n"
    start = ", the start of the run included" if plan.start_hours else ""
    text += f"one after the other: {duration(plan.hours)}{start}; on all devices: {duration(plan.device_hours)}\n"
    text += f"longest path: {duration(plan.longest_hours)}, {' -> '.join(plan.longest_path)}\n"
    text += listed(plan.assumptions)
    text += "".join(f"\nwarning: {line}" for line in plan.warnings)
    return text + "".join(f"\nnote: {line}" for line in plan.notes)
