"""What a recipe will cost, estimated before anything runs, and what looks wrong with it.

FLOPs here are multiply-adds counted once, as in torchvision's tables and in all our reports. A device's TFLOP/s, as its
maker states them, count the multiply and the add: a stage takes 2 x multiply-adds / (TFLOP/s x efficiency) seconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gowide_dist.effects import without_effect
from gowide_dist.errors import DataError, RunError
from gowide_dist.identity import fingerprint, identities
from gowide_dist.insight.assumed import (
    DataSize,
    decoded_per_s,
    device_of,
    is_this_machine,
    known_outputs,
    notes_on_logits,
)
from gowide_dist.insight.text import duration, gigabytes, listed, table
from gowide_dist.instances import Instance
from gowide_dist.launch.profile import Device, Profile, Resources
from gowide_dist.prepare import Prepared, check_data, check_files
from gowide_dist.recipe import Recipe
from gowide_dist.run import Run
from gowide_dist.timeline import Batching, Timeline
from gowide_dist.train.checkpoint import whole_checkpoints
from gowide_dist.train.costs import (
    HEAP_WASTE,
    HOST_PARTS,
    memory_per_process,
    memory_together,
    network_cost,
    stage_cost,
    training_macs,
)
from gowide_dist.train.fit import check_fit

FEW_IMAGES_PER_GPU = 32  # below, GPUs idle and batch norms see few images


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


@dataclass(frozen=True)
class Plan:
    """The stages, parents first, with the assumptions, warnings and notes."""

    recipe: str
    data: DataSize
    assumptions: dict[str, str]
    stages: list[StagePlan]
    hours: float  # one stage after the other
    device_hours: float
    longest_path: list[str]
    longest_hours: float
    warnings: list[str]
    notes: list[str]


@dataclass(frozen=True)
class SeedsPlan:
    """A recipe with several seeds. A stage that they share counts for the first of them."""

    plans: list[Plan]
    hours: float  # one stage after the other
    device_hours: float
    longest_hours: float  # all seeds side by side


def plan_seeds(recipes: Sequence[Recipe], size: DataSize, profile: Profile, *, runs: Path | None = None) -> SeedsPlan:
    """Plan the recipes of several seeds, as `plan` does each."""
    shared: dict[str, tuple[str, float]] = {}  # by fingerprint: the run that trains it, in so many hours
    plans, longest = list[Plan](), list[float]()
    for recipe in recipes:
        fingerprints = {key: fingerprint(identity) for key, identity in identities(recipe, {}).items()}
        known = {key: shared[of_key] for key, of_key in fingerprints.items() if of_key in shared}
        plans.append(plan(recipe, size, profile, runs=runs, shared={key: run for key, (run, _) in known.items()}))
        hours = {stage.stage: known.get(stage.stage, ("", stage.hours))[1] for stage in plans[-1].stages}
        longest.append(_longest_path(recipe, profile.jobs(recipe.instances.values()), hours)[1])
        shared = {of_key: (recipe.name, hours[key]) for key, of_key in fingerprints.items()} | shared
    return SeedsPlan(plans, sum(each.hours for each in plans), sum(each.device_hours for each in plans), max(longest))


def plan(
    recipe: Recipe, size: DataSize, profile: Profile, *,
    runs: Path | None = None, shared: Mapping[str, str] | None = None,
) -> Plan:  # fmt: skip
    """Plan a recipe on a cluster or `this_machines_cores`. runs: where stages may be done already.

    shared: the runs that train instances which this one shares with them. Writes nothing. Raises UserError if recipe,
    data and profile do not fit.
    """
    if size.train < recipe.batch_size:
        raise DataError(f"batch_size: {recipe.batch_size} is more than the {size.train:,} training images")
    check_fit(recipe, recipe.instances.values(), size.classes)
    progress = _progress(recipe, runs) if runs else {}
    for key, run in (shared or {}).items():
        progress.setdefault(key, f"shared with {run}")
    done = {key for key, state in progress.items() if isinstance(state, str)}
    jobs = profile.jobs(recipe.instances.values())
    known = known_outputs(recipe, done, jobs)
    stages: list[StagePlan] = []
    warnings: list[str] = []
    for key, instance in recipe.instances.items():
        resources = profile.resources(instance)
        stages.append(_plan_stage(instance, recipe, size, resources, progress.get(key, 0), key not in known))
        warnings += _warnings(stages[-1], recipe, size, resources) if stages[-1].steps_left else []
    planned = {stage.stage: stage for stage in stages if stage.steps_left}
    for job in jobs:
        if unfinished := [planned[instance.key] for instance in job if instance.key in planned]:
            warnings += _memory_warning(unfinished, profile.resources(job[0]))
    left = [recipe.instances[stage.stage] for stage in stages if not isinstance(progress.get(stage.stage), str)]
    warnings += without_effect(recipe, left, size.train)
    notes = list(notes_on_logits(recipe, left, size, profile))
    for instance in left:
        if instance.init_file and instance.init_file.file.exists():
            try:
                notes += check_files(recipe, [instance], size.classes)
            except RunError as error:  # `gowide run` refuses
                warnings.append(str(error))
            except DataError:  # the dataset is elsewhere
                pass
    if not is_this_machine(profile):
        notes += _notes_on_jobs(recipe, size, profile, stages)
    path, hours = _longest_path(recipe, jobs, {stage.stage: stage.hours for stage in stages})
    return Plan(
        recipe=recipe.name,
        data=size,
        assumptions=_assumptions(recipe, size, profile),
        stages=stages,
        hours=sum(stage.hours for stage in stages),
        device_hours=sum(stage.device_hours for stage in stages),
        longest_path=path,
        longest_hours=hours,
        warnings=warnings,
        notes=notes,
    )


def _notes_on_jobs(recipe: Recipe, size: DataSize, profile: Profile, stages: Sequence[StagePlan]) -> Iterator[str]:
    """What the networks of a stage take in one job, and what in jobs of their own."""
    planned = {stage.stage: stage for stage in stages if stage.steps_left}
    for job in profile.jobs([recipe.instances[key] for key in planned]):
        if len(job) == 1:
            continue
        together = [planned[instance.key] for instance in job]
        alone = [
            _plan_stage(
                instance, recipe, size, profile.resources(instance), stage.steps - stage.steps_left,
                not instance.stage.has_stored_logits,
            )
            for instance, stage in zip(job, together, strict=True)
        ]  # fmt: skip
        networks = ", ".join(instance.network_name for instance in job)
        yield (
            f"{job[0].stage_name}: {networks} are one job of {duration(sum(stage.hours for stage in together))}, "
            f"{duration(sum(stage.device_hours for stage in together))} on all devices; with together: false "
            f"{len(job)} jobs, the longest of {duration(max(stage.hours for stage in alone))}, "
            f"{duration(sum(stage.device_hours for stage in alone))} on all devices"
        )


def _longest_path(
    recipe: Recipe, jobs: Sequence[Sequence[Instance]], hours: Mapping[str, float]
) -> tuple[list[str], float]:
    """The path of dependent jobs that takes longest: their instances, and its hours."""
    job_of = {instance.key: str(number) for number, job in enumerate(jobs) for instance in job}
    lengths = {str(number): sum(hours[instance.key] for instance in job) for number, job in enumerate(jobs)}
    parents = {
        str(number): [job_of[parent] for instance in job for parent in instance.parents]
        for number, job in enumerate(jobs)
    }
    path, length = longest_path(lengths, parents)
    return [instance.key for number in path for instance in jobs[int(number)]], length


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
    """The path through the graph that takes longest, and its length."""

    @functools.cache
    def best(key: str) -> tuple[list[str], float]:
        before = [best(parent) for parent in parents[key] if parent in lengths]
        path, so_far = max(before, key=lambda entry: entry[1], default=([], 0.0))
        return [*path, key], so_far + lengths[key]

    return max(map(best, lengths), key=lambda entry: entry[1], default=([], 0.0))


def _progress(recipe: Recipe, runs: Path) -> dict[str, str | int]:
    """Of instances of this recipe that have begun: where they are done, or the step of their newest checkpoint."""
    try:
        recipe, checksums = check_data(recipe)
    except DataError:
        return {}
    run = Run(runs / recipe.name)
    prepared = Prepared(recipe, run, recipe.instances, identities(recipe, checksums))
    progress: dict[str, str | int] = {}
    for key in recipe.instances:
        stage_dir, own = run.stage(key), fingerprint(prepared.identities[key])
        if stage_dir.is_done(own):
            progress[key] = "done"
        elif other := prepared.sibling(key):
            progress[key] = f"done in {other.path.parents[2]}"
        elif steps := whole_checkpoints(stage_dir.checkpoints, own):
            progress[key] = steps[-1]
    return progress


def _plan_stage(
    instance: Instance, recipe: Recipe, size: DataSize, resources: Resources, progress: str | int, teacher_runs: bool
) -> StagePlan:
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


def _warnings(stage: StagePlan, recipe: Recipe, size: DataSize, resources: Resources) -> Iterator[str]:
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


def _memory_warning(stages: Sequence[StagePlan], resources: Resources) -> Iterator[str]:
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


def _assumptions(recipe: Recipe, size: DataSize, profile: Profile) -> dict[str, str]:
    device, decoded = device_of(profile), decoded_per_s(size, device_of(profile))
    is_in_profile = profile.device is not None and not is_this_machine(profile)
    speed = (
        f"{device.name}: {device.tflops:g} TFLOP/s x {device.efficiency:g} reached = {device.flops / 1e12:.3g} TFLOP/s "
        f"per process ({'cluster profile' if is_in_profile else 'assumed; small networks reach less'})"
    )
    if is_this_machine(profile) and profile.stages:
        speed = f"FLOP/s of a few steps of each stage, measured now, processes: {profile.tasks_per_node}"
    lines = {
        "data": f"{size.train:,} training and {size.val:,} validation images, {size.classes} classes ({size.source})",
        "FLOPs": "multiply-adds counted once, by PyTorch; a device's TFLOP/s count both",
        "time": f"{speed}; validation passes and the start of processes and stages included",
    }
    if math.isfinite(decoded):
        lines["data loading"] = f"{decoded:,.0f} images/s per CPU"
    if not is_this_machine(profile):
        lines["jobs"] = (
            f"{device.start_s:g} s to start; limit {profile.timeout_min / 60:g} hours; a job that reaches it saves, "
            "is requeued and resumes; waiting in the queue is not counted"
        )
    halves = f", half of it in {recipe.precision}" if recipe.precision in ("bf16", "fp16") else ""
    waste = "" if profile.gpus_per_node else f"; {HEAP_WASTE:.0%} more, which malloc wastes"
    lines["memory"] = (
        f"4 bytes per weight, gradient, momentum and average; activations and temporary tensors{halves}{waste}; "
        "the teacher's weights; the loader's batches; a checkpoint being written; 0.6 GB of libraries; without the "
        "dataset's pages that the system caches"
    )
    return lines


def plan_table(plan: Plan) -> str:
    """The plan as lines of text."""
    head = ("stage", "state", "epochs", "steps", "forward", "backward", "teacher", "TFLOPs", "parameters", "GB/process",
            "processes", "batch", "time", "device time", "requeues")  # fmt: skip
    rows = [
        (
            stage.stage, stage.state, str(stage.epochs), f"{stage.steps:,}",
            *(f"{macs / 1e6:,.3f}".rstrip("0").rstrip(".") for macs in stage.macs.values()),
            f"{stage.total_macs / 1e12:,.2f}", f"{stage.parameters:,}", f"{sum(stage.memory.values()) / 1e9:.2f}",
            str(stage.num_processes), str(stage.batch_per_process), duration(stage.hours),
            duration(stage.device_hours), "endless" if stage.requeues is None else f"{stage.requeues:g}",
        )
        for stage in plan.stages
    ]  # fmt: skip
    lines = [
        f"{plan.recipe}: forward, backward and teacher in MFLOPs for a training image; time of what is left",
        f"{table(head, rows, left=(0, 1))}\n",
        f"one after the other: {duration(plan.hours)}; on all devices: {duration(plan.device_hours)}",
        f"longest path: {duration(plan.longest_hours)}, {' -> '.join(plan.longest_path)}",
        listed(plan.assumptions),
        *(f"warning: {line}" for line in plan.warnings),
        *(f"note: {line}" for line in plan.notes),
    ]
    return "\n".join(lines)


def seeds_table(planned: SeedsPlan) -> str:
    """The first seed's plan, and what each of them takes, as lines of text."""
    rows = [(each.recipe, duration(each.hours), duration(each.device_hours)) for each in planned.plans]
    return "\n".join(
        [
            plan_table(planned.plans[0]),
            f"\n{table(('run', 'time', 'device time'), rows)}\n",
            f"all {len(rows)} seeds: one stage after the other {duration(planned.hours)}; on all devices "
            f"{duration(planned.device_hours)}; side by side {duration(planned.longest_hours)}",
        ]
    )
