"""Chains of Slurm jobs: which stage instances need one, what each waits for, and submitting them."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from gowide_dist.errors import DataError
from gowide_dist.files import try_lock
from gowide_dist.identity import fingerprint, identities
from gowide_dist.instances import Instance
from gowide_dist.launch.code import code_folder, copy_package
from gowide_dist.launch.local import device_environment
from gowide_dist.launch.profile import Profile
from gowide_dist.launch.queue import (
    JobState,
    SlurmError,
    call,
    cancel,
    encoding_job,
    job_name,
    newest_jobs,
    read_jobs,
    write_job,
)
from gowide_dist.launch.slurm import Job, Worker, check_folder, sbatch_script, submit_job
from gowide_dist.prepare import Prepared, check_group, check_run
from gowide_dist.progress import say_once
from gowide_dist.recipe import Recipe
from gowide_dist.run import Run

LOGITS = "teacher_logits"  # begins the keys of jobs that store a teacher's logits


class Action(Enum):
    """What a submission does about the job of a stage instance."""

    SUBMIT = "it has none: submit one"
    WAIT_FOR = "Slurm has it, waiting or running: children depend on it"
    SHARE = "Slurm has it, or has just got it, for a run of another seed: children depend on that one"
    FOLLOW = "its processes are being ended: submit one that starts afterwards"
    REPLACE = "it waits for a job that has failed: cancel it and submit another"


def action_for(state: JobState | None, *, waits_in_vain: bool = False) -> Action:
    """What to do about an unfinished instance, by Slurm's word on its newest job."""
    if state and (state.is_waiting or state.is_running):
        return Action.REPLACE if state.is_waiting and waits_in_vain else Action.WAIT_FOR
    return Action.FOLLOW if state and state.is_leaving else Action.SUBMIT


class Planned(NamedTuple):
    """The jobs of one stage instance: the id of the one that Slurm has, and the one to submit."""

    action: Action
    slurm_id: str | None
    job: Job | None


@dataclass(frozen=True)
class Chain:
    """The jobs of a run, by stage instance, parents first.

    known: ids of the run's jobs when this was planned, to notice a command that submits jobs at the same time.
    fingerprints: of the recipe's instances.
    """

    folder: Path
    planned: Mapping[str, Planned]
    known: Mapping[str, Sequence[str]] | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def jobs(self) -> list[Job]:
        """The jobs to submit, parents first."""
        ordered: dict[tuple[str, ...], Job] = {}

        def place(job: Job | None) -> None:
            if job and job.keys not in ordered:
                for parent in job.parents:
                    if parent in self.planned:
                        place(self.planned[parent].job)
                ordered[job.keys] = job

        for planned in self.planned.values():
            place(planned.job)
        return [*ordered.values()]

    @property
    def in_jobs(self) -> set[str]:
        """The instances whose folders a job of Slurm's may be writing."""
        return {*self._awaited, *self._slurm_ids(Action.FOLLOW)}

    @property
    def rehearsed_ids(self) -> dict[str, str]:
        """The jobs of a rehearsal, by instance; ids that are not known yet read `ID_OF_stage/network`."""
        return self._awaited | {key: f"ID_OF_{job.key}" for job in self.jobs for key in job.keys}

    def scripts(self) -> list[str]:
        """The sbatch scripts as they would be submitted, with `rehearsed_ids`."""
        ids = self.rehearsed_ids
        return [f"{sbatch_script(job, self.folder, self._dependency(job, ids))}\n" for job in self.jobs]

    def try_out(self) -> list[str]:
        """When and where Slurm would start the jobs, had they no parents. Raises SlurmError if it refuses one."""
        answers = []
        for job in self.jobs:
            script = sbatch_script(job, self.folder, self._dependency(job, {}))
            try:
                answer = call("sbatch", "--test-only", script=script)
            except SlurmError as error:
                raise SlurmError(f"{job.key}: {error}") from error
            answers.append(f"{job.key}: {' '.join(answer.split())}")
        return answers

    def submit(self) -> dict[str, str]:
        """Submit the jobs and note their ids; the ids of all jobs of the run that are now in the queue.

        Raises SlurmError, with nothing submitted, if one is refused or another command submits jobs of the same run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with try_lock(self.folder / "lock") as is_locked:
            if not is_locked or (self.known is not None and read_jobs(self.folder) != self.known):
                raise SlurmError(f"{self.folder}: another command has just submitted jobs of this run; try again")
            if replaced := self._slurm_ids(Action.REPLACE):
                cancel(replaced.values())
            for code in {job.code for job in self.jobs if job.code}:
                copy_package(code)
            ids, submitted = self._awaited, list[str]()
            try:
                for job in self.jobs:
                    job_id = submit_job(job, self.folder, self._dependency(job, ids))
                    submitted.append(job_id)
                    for key in job.keys:
                        ids[key] = job_id
                        write_job(self.folder, key, job_id)
            except BaseException as error:
                if submitted:
                    cancel(submitted)
                if isinstance(error, SlurmError):
                    raise SlurmError(f"{job.key}: {error}; nothing was submitted") from error
                raise
            return ids

    @property
    def _awaited(self) -> dict[str, str]:
        """The jobs that children depend on, by instance, of those that Slurm has."""
        return self._slurm_ids(Action.WAIT_FOR) | self._slurm_ids(Action.SHARE)

    def _slurm_ids(self, action: Action) -> dict[str, str]:
        """The jobs that Slurm has, by instance, of the instances with this action."""
        planned = self.planned.items()
        return {key: each.slurm_id for key, each in planned if each.action is action and each.slurm_id}

    def _dependency(self, job: Job, ids: Mapping[str, str]) -> str:
        """sbatch's --dependency. Parents that are finished already have no id."""
        parents = dict.fromkeys(ids[parent] for parent in job.parents if parent in ids)
        conditions = [f"afterok:{':'.join(parents)}"] if parents else []
        first = self.planned[job.keys[0]]
        if first.action is Action.FOLLOW:
            conditions.append(f"afterany:{first.slurm_id}")
        return ",".join(conditions)


def prepare_chain(
    recipe: Recipe, runs: Path, profile: Profile, *,
    only: Sequence[str] = (), fresh: bool = False, copy_code: bool = True, shared: Mapping[str, str] | None = None,
) -> tuple[Prepared, Chain]:  # fmt: skip
    """A Slurm job for each instance that is neither finished nor in the queue; writes nothing.

    While jobs of `gowide encode --cluster` write the data, the chain depends on these, and its jobs check the data.

    copy_code: jobs import the package as it is now, which `submit` copies into the run. shared: jobs of runs of other
    seeds, by fingerprint, which train what this run needs too.

    Raises UserError if the recipe does not fit the data, the profile or the run directory.
    """
    run = Run(runs.absolute() / recipe.name)
    check_folder(run.slurm, profile)
    for name in {*profile.stages} - {*recipe.stages} - {*recipe.instances}:
        say_once(f"gowide: cluster profile: stages.{name} matches no stage of the recipe; ignored")
    known = read_jobs(run.slurm)
    states = {key: state for key, state in newest_jobs(run.slurm, recipe.name).items() if not state.is_over}
    if encoding := _encoding(recipe):
        selected = recipe.select(only) if only else recipe.instances
        prepared = Prepared(recipe, run, selected, identities(recipe, {}))  # the jobs check the data
    else:
        prepared = check_run(recipe, run.path.parent, only=only, fresh=fresh, in_jobs=states.keys())
    fingerprints = {key: fingerprint(identity) for key, identity in prepared.identities.items()}
    unfinished = {instance.key for instance in prepared.unfinished}
    left = {key: state for key, state in states.items() if key not in unfinished}
    planned = {key: Planned(action_for(state), state.job_id, None) for key, state in left.items()}
    to_submit: dict[tuple[Action, str | None], list[Instance]] = {}  # by what is to be done with which job
    for instance in prepared.unfinished:  # parents first
        state = states.get(instance.key)
        if state is None and shared and (job_id := shared.get(fingerprints[instance.key])):
            planned[instance.key] = Planned(Action.SHARE, job_id, None)
            continue
        queued = {key for key, each in planned.items() if each.action in (Action.WAIT_FOR, Action.SHARE)}
        action = action_for(state, waits_in_vain=not unfinished.isdisjoint({*instance.parents} - queued))
        if action is Action.SUBMIT and prepared.sibling(instance.key):
            continue
        planned[instance.key] = Planned(action, state.job_id if state else None, None)
        if action is not Action.WAIT_FOR:
            old = state.job_id if state and action is not Action.SUBMIT else None
            to_submit.setdefault((action, old), []).append(instance)
    for instances in to_submit.values():
        for job in _jobs(instances, recipe, run, profile, copy_code):
            waits = replace(job, parents=(*job.parents, *encoding))
            planned |= {key: planned[key]._replace(job=waits) for key in job.keys}
    planned |= encoding
    _add_logits_jobs(planned, recipe, fingerprints, shared)
    return prepared, Chain(run.slurm, planned, known, fingerprints)


def _encoding(recipe: Recipe) -> dict[str, Planned]:
    """The jobs that are writing the recipe's data, by a name for each."""
    folders = dict.fromkeys(path.parent.absolute() for path in (recipe.data.train, recipe.data.val))
    jobs = {f"encode of {folder.name}": encoding_job(folder) for folder in folders}
    return {name: Planned(Action.WAIT_FOR, job_id, None) for name, job_id in jobs.items() if job_id}


def rehearse_chain(
    recipe: Recipe, runs: Path, profile: Profile, *,
    only: Sequence[str] = (), fresh: bool = False, copy_code: bool = True, shared: Mapping[str, str] | None = None,
) -> Chain:  # fmt: skip
    """What `prepare_chain` would submit. Without the data, which a dry run can do without: a job for each instance."""
    try:
        return prepare_chain(recipe, runs, profile, only=only, fresh=fresh, copy_code=copy_code, shared=shared)[1]
    except DataError as error:
        sys.stderr.write(f"gowide: {error}; showing the jobs of a run that starts from scratch\n")
    run = Run(runs.absolute() / recipe.name)
    fingerprints = dict[str, str]()  # files of weights may be missing as the data are; seeds tell the runs apart
    for key, instance in recipe.instances.items():
        fingerprints[key] = f"{key} of seed {instance.seed} after {[fingerprints[each] for each in instance.parents]}"
    selected = recipe.select(only) if only else recipe.instances
    known = {key: job_id for key in selected if (job_id := (shared or {}).get(fingerprints[key]))}
    planned = {key: Planned(Action.SHARE, job_id, None) for key, job_id in known.items()}
    left = [instance for key, instance in selected.items() if key not in known]
    for job in _jobs(left, recipe, run, profile, copy_code):
        planned |= {key: Planned(Action.SUBMIT, None, job) for key in job.keys}
    _add_logits_jobs(planned, recipe, fingerprints, shared)
    return Chain(run.slurm, planned, fingerprints=fingerprints)


def _jobs(instances: Sequence[Instance], recipe: Recipe, run: Run, profile: Profile, copy_code: bool) -> Iterator[Job]:
    """The jobs of instances. Raises RecipeError if the global batch cannot be split over the processes of one."""
    for group in profile.jobs(instances):
        resources, keys = profile.resources(group[0]), tuple(instance.key for instance in group)
        for num_processes in resources.num_processes:
            check_group(recipe, num_processes, on_gpus=resources.gpus_per_node > 0)
        worker = Worker("gowide_dist.pipeline", (str(run.path), *keys))
        job = Job(
            keys, "", worker, resources, tuple(dict.fromkeys(parent for each in group for parent in each.parents)),
            device_environment(resources.gpus_per_node), code_folder(run.slurm) if copy_code else None,
        )  # fmt: skip
        yield replace(job, name=job_name(recipe.name, job.key))


def _add_logits_jobs(
    planned: dict[str, Planned], recipe: Recipe, fingerprints: dict[str, str], shared: Mapping[str, str] | None
) -> None:
    """Where several jobs need the same stored logits, let them depend on one that stores these: no job waits for
    another while it holds its nodes. Of several seeds (`shared`) with one data stream, the first one's job does.
    """
    needing: dict[tuple[Hashable, ...], list[Job]] = {}
    for job in {id(each.job): each.job for each in planned.values() if each.job}.values():
        instance = recipe.instances[job.keys[0]]
        if instance.stage.has_stored_logits:
            needing.setdefault(instance.teacher_stream, []).append(job)
    for stream, jobs in needing.items():
        if len(jobs) == 1 and (shared is None or recipe.data.seed is None):
            continue
        first = recipe.instances[jobs[0].keys[0]]
        assert first.teacher is not None, "its logits are stored"
        key = f"{LOGITS}/{first.stage_name}"
        fingerprints[key] = f"logits of {fingerprints[first.teacher]} for {[*stream]}"
        if job_id := (shared or {}).get(fingerprints[key]):
            planned[key] = Planned(Action.SHARE, job_id, None)
        elif key not in planned or planned[key].action is not Action.WAIT_FOR:
            worker = replace(jobs[0].worker, arguments=(jobs[0].worker.arguments[0], first.key, "--logits"))
            stores = replace(
                jobs[0], keys=(key,), name=job_name(recipe.name, key), worker=worker, parents=(first.teacher,)
            )
            planned[key] = Planned(Action.SUBMIT, None, stores)
        for job in jobs:
            waits = replace(job, parents=(*job.parents, key))
            planned |= {each: planned[each]._replace(job=waits) for each in job.keys}
