"""The state of jobs, from squeue and sacct: quick, and without submitit, whose view of a job goes stale."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gowide_dist.errors import RunError, UserError
from gowide_dist.files import write_atomically

ANSWER_WITHIN_S = 60
ENCODE = "encode"  # the key of the job that encodes a dataset
_QUEUE_FIELDS = ("JobID", "State", "Reason", "NodeList", "RestartCnt", "StartTime", "Name")  # a name may hold anything
_OPTION_VARIABLES = ("SBATCH_", "SLURM_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_")
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "CONFIGURING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING"}


class SlurmError(UserError):
    """Slurm is absent, does not answer, or refuses a command."""


@dataclass(frozen=True)
class JobState:
    """A job in Slurm's words. reason: why it waits. starts: when Slurm expects it to start, if it does."""

    job_id: str
    name: str
    state: str
    nodes: str
    reason: str = ""
    restarts: int = 0
    starts: str = ""

    @property
    def is_waiting(self) -> bool:
        return self.state in _WAITING

    @property
    def is_running(self) -> bool:
        return self.state in _RUNNING

    @property
    def is_leaving(self) -> bool:
        """Its processes are being ended; afterwards it is either over or queued again."""
        return self.state == "COMPLETING"

    @property
    def is_over(self) -> bool:
        return not (self.is_waiting or self.is_running or self.is_leaving)


@contextmanager
def without_options_of_the_shell() -> Iterator[None]:
    """Inside, the environment has none of the shell's variables that stand for options of Slurm's commands: sbatch
    would prefer SBATCH_TIMELIMIT to what its script says, squeue with SQUEUE_STATES would hide jobs. What says where
    Slurm is, and who we are, stays.
    """
    shells = {
        name: os.environ.pop(name)
        for name in [*os.environ]
        if name.startswith(_OPTION_VARIABLES) and name not in ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
    }
    try:
        yield
    finally:
        os.environ.update(shells)


def call(*command: str, script: str | None = None) -> str:
    """What a Slurm command writes to stdout; with a script on its stdin, what it writes to stderr.

    Raises SlurmError with its error message if it fails.
    """
    require(command[0])
    try:
        with without_options_of_the_shell():
            result = subprocess.run(
                command, input=script, capture_output=True, text=True, timeout=ANSWER_WITHIN_S, check=False
            )
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]}: Slurm's controller does not answer; try again later") from error
    if result.returncode:
        raise SlurmError(complaint(command[0], result.stderr))
    return result.stdout if script is None else result.stderr


def require(command: str) -> None:
    """Raises SlurmError if a command of Slurm is absent."""
    if not shutil.which(command):
        raise SlurmError(f"{command} not found: this machine belongs to no Slurm cluster; `gowide run` trains here")


def complaint(command: str, stderr: str) -> str:
    """The error message of a Slurm command, in one line."""
    lines = [line.removeprefix(f"{command}: ").removeprefix("error: ") for line in stderr.splitlines() if line.strip()]
    return f"{command}: {'; '.join(dict.fromkeys(lines)) or 'failed without an error message'}"


def read_jobs(folder: Path) -> dict[str, list[str]]:
    """The ids of the jobs submitted for each stage instance, newest last, with those that batch scripts submitted."""
    return {key: [*ids, *_follow_ups(folder, ids[-1])] for key, ids in _read_submitted(folder).items()}


def is_followed(folder: Path, job_id: str) -> bool:
    """Whether a job's batch script has submitted another to go on."""
    return _next(folder, job_id).exists()


def _next(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}_next"


def _follow_ups(folder: Path, job_id: str) -> Iterator[str]:
    """The job that a job's batch script submitted to go on, the one that that one submitted, and so on."""
    while is_followed(folder, job_id) and (job_id := _next(folder, job_id).read_text().strip()):
        yield job_id


def _read_submitted(folder: Path) -> dict[str, list[str]]:
    path = folder / "jobs.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: damaged; cancel this run's jobs with scancel and delete it") from error


def write_job(folder: Path, key: str, job_id: str) -> None:
    """Record the newest job of a stage instance."""
    jobs = _read_submitted(folder)
    jobs.setdefault(key, []).append(job_id)
    write_atomically(folder / "jobs.json", json.dumps(jobs, indent=2) + "\n")


def job_name(run: str, key: str) -> str:
    """The name of the jobs of a stage instance, or of a stage."""
    return f"{run}:{key}"


def newest_jobs(folder: Path, run: str) -> dict[str, JobState]:
    """The state of the newest job of each instance, also of instances that the recipe no longer has.

    A job with another name than the run's jobs have is another's: a cluster that is set up anew counts ids from 1.
    """
    newest = {key: ids[-1] for key, ids in read_jobs(folder).items()}
    states: dict[str, JobState] = {}
    for read in (_from_squeue, _from_sacct):  # squeue forgets a job minutes after its end
        if missing := {job_id for key, job_id in newest.items() if key not in states}:
            jobs = {job.job_id: job for job in read(sorted(missing))}
            for key, job_id in newest.items():
                names = job_name(run, key), job_name(run, key.partition("/")[0])
                if (job := jobs.get(job_id)) and job.name in names:
                    states[key] = job
    return states


def encode_folder(out: Path) -> Path:
    """Where the job that encodes a dataset into `out` has its files."""
    return out.with_name(f"{out.name}.slurm")


def encoding_job(out: Path) -> str | None:
    """The id of the job that encodes, or will encode, a dataset into `out`."""
    job = newest_jobs(encode_folder(out), out.name).get(ENCODE) if read_jobs(encode_folder(out)) else None
    return job.job_id if job and not job.is_over else None


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs, children before the parents that they wait for."""
    call("scancel", *sorted({*job_ids}, key=int, reverse=True))


def _from_squeue(_job_ids: list[str]) -> Iterable[JobState]:
    """All jobs of this user: squeue refuses to list ids of which it does not know one."""
    fields = ",".join(f"{field}:|" for field in _QUEUE_FIELDS)
    for line in call("squeue", "--me", "--noheader", "--states=all", f"--Format={fields}").splitlines():
        job_id, state, reason, nodes, restarts, starts, name = line.removesuffix("|").split("|", len(_QUEUE_FIELDS) - 1)
        reason, starts = ("" if text in ("None", "N/A") else text for text in (reason, starts))
        yield JobState(job_id, name, state, nodes, reason, int(restarts), starts)


def _from_sacct(job_ids: list[str]) -> Iterable[JobState]:
    try:
        lines = call("sacct", "-X", "-n", "-P", "--format=JobID,State,NodeList,JobName", "-j", ",".join(job_ids))
    except SlurmError:
        return  # no accounting on this cluster: a job that squeue does not list is over
    for line in lines.splitlines():
        job_id, state, nodes, name = line.split("|", 3)
        yield JobState(job_id, name, state.split(" ")[0], nodes.replace("None assigned", ""))
