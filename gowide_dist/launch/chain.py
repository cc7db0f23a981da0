"""Chains of Slurm jobs: which stage instances need one, and what each waits for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from gowide_dist.errors import DataError
from gowide_dist.launch.profile import Profile
from gowide_dist.launch.queue import job_name, newest_jobs, read_jobs
from gowide_dist.launch.slurm import Chain, Job, Worker, check_folder
from gowide_dist.prepare import Prepared, check_group, check_run, sibling
from gowide_dist.recipe import Instance, Recipe
from gowide_dist.run import Run


def prepare_chain(
    recipe: Recipe, runs: Path, profile: Profile, *, only: Sequence[str] = (), fresh: bool = False
) -> tuple[Prepared, Chain]:
    """A Slurm job for each instance that is neither finished nor in the queue; writes nothing.

    Raises UserError if the recipe does not fit the data, the profile or the run directory.
    """
    run = Run(runs.absolute() / recipe.name)
    check_folder(run.slurm, profile)
    known = read_jobs(run.slurm)
    states = newest_jobs(run.slurm, recipe.name)
    queued = {key: state.job_id for key, state in states.items() if state.is_waiting or state.is_running}
    leaving = {key: state.job_id for key, state in states.items() if state.is_leaving}
    prepared = check_run(recipe, run.path.parent, only=only, fresh=fresh, in_jobs={*queued, *leaving})
    unfinished = [instance.key for instance in prepared.unfinished]
    stale: dict[str, str] = {}
    for key in unfinished:  # parents first
        waits_in_vain = {*recipe.instances[key].parents} & {*unfinished} - {*queued}
        if key in queued and states[key].is_waiting and waits_in_vain:
            stale[key] = queued.pop(key)
    left = [
        instance
        for instance in prepared.unfinished
        if instance.key not in queued and sibling(instance, prepared) is None
    ]
    return prepared, Chain(run.slurm, _jobs(left, recipe, run, profile), queued, leaving, stale, known)


def rehearse_chain(
    recipe: Recipe, runs: Path, profile: Profile, *, only: Sequence[str] = (), fresh: bool = False
) -> Chain:
    """What `prepare_chain` would submit; without the data, which a rehearsal can do without, all that was selected."""
    try:
        return prepare_chain(recipe, runs, profile, only=only, fresh=fresh)[1]
    except DataError as error:
        sys.stderr.write(f"gowide: {error}; these are the jobs of a run of which nothing is finished\n")
    run = Run(runs.absolute() / recipe.name)
    selected = recipe.select(only) if only else recipe.instances
    return Chain(run.slurm, _jobs(selected.values(), recipe, run, profile), {}, {})


def _jobs(instances: Iterable[Instance], recipe: Recipe, run: Run, profile: Profile) -> tuple[Job, ...]:
    """The instances' jobs. Raises RecipeError if the global batch cannot be shared by a job's processes."""
    for name in {*profile.stages} - {*recipe.stages} - {*recipe.instances}:
        sys.stderr.write(f"gowide: the cluster profile's stages.{name} is no stage of recipe {recipe.name}\n")
    jobs = []
    for instance in instances:
        resources = profile.resources(instance)
        for num_processes in resources.num_processes:
            check_group(recipe, num_processes, on_gpus=resources.gpus_per_node > 0)
        worker = Worker("gowide_dist.pipeline", (str(run.path), instance.key))
        jobs.append(Job(instance.key, job_name(recipe.name, instance.key), instance.parents, worker, resources))
    return tuple(jobs)
