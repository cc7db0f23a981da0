"""What a recipe will cost, estimated before anything runs: its stages, their longest path, warnings and notes."""

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
from gowide_dist.insight.plan_warnings import memory_warning, stage_warnings
from gowide_dist.insight.stage_plan import StagePlan, plan_stage
from gowide_dist.insight.text import duration, listed, table
from gowide_dist.instances import Instance
from gowide_dist.launch.profile import Profile
from gowide_dist.prepare import Prepared, check_data, check_files
from gowide_dist.recipe import Recipe
from gowide_dist.run import Run
from gowide_dist.train.checkpoint import whole_checkpoints
from gowide_dist.train.costs import HEAP_WASTE
from gowide_dist.train.fit import check_fit


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
        stages.append(plan_stage(instance, recipe, size, resources, progress.get(key, 0), key not in known))
        warnings += stage_warnings(stages[-1], recipe, size, resources) if stages[-1].steps_left else []
    planned = {stage.stage: stage for stage in stages if stage.steps_left}
    for job in jobs:
        if unfinished := [planned[instance.key] for instance in job if instance.key in planned]:
            warnings += memory_warning(unfinished, profile.resources(job[0]))
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
            plan_stage(
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
