"""Chains of Slurm jobs through submitit: one job per stage instance, one task per process."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gowide_dist.errors import RunError
from gowide_dist.files import try_lock
from gowide_dist.launch.local import ERROR_FILE_VARIABLE, read_error
from gowide_dist.launch.profile import Profile, Resources
from gowide_dist.launch.queue import SlurmError, call, cancel, complaint, read_jobs, write_job

if TYPE_CHECKING:
    from submitit import SlurmExecutor
    from submitit.core.utils import DelayedSubmission

MANY_TIMEOUTS = 10_000  # a stage goes on over as many allocations as it needs
FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below the ports that Linux gives to outgoing connections
LEFT_FOR_SLURM_S = 60


@dataclass(frozen=True)
class Worker:
    """What every process of a job executes: `main(arguments)` of a module, in the process group of the job."""

    module: str
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Enter the process group and train. When told to stop, save, and let Slurm queue the job again."""
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        queue_again = signal.getsignal(signal.SIGUSR2)  # submitit's: dumps `checkpoint()` and requeues, on rank 0
        environment = JobEnvironment()
        start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        port = FIRST_PORT + (int(environment.raw_job_id) + 7919 * start) % NUM_PORTS  # jobs on one node don't meet
        os.environ["MASTER_PORT"] = str(port)
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ[ERROR_FILE_VARIABLE] = str(error_file(environment.paths.folder, environment.raw_job_id, start))
        status = importlib.import_module(self.module).main(self.arguments)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a warning that comes while Python winds up would kill it
        if status == 128 + signal.SIGUSR2:
            assert callable(queue_again)
            with contextlib.suppress(SystemExit):
                queue_again(signal.SIGUSR2, None)
            status = 0
        elif status == 2:
            sys.stderr.write(f"{read_error(Path(os.environ[ERROR_FILE_VARIABLE])) or 'full disk'}\n")
        elif status == 128 + signal.SIGTERM:
            # Sent before a job is cancelled, preempted or requeued: Slurm knows which, and ends this process itself.
            time.sleep(LEFT_FOR_SLURM_S)
        if status:
            sys.exit(status)

    def checkpoint(self) -> DelayedSubmission:
        """The same again: training finds its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Job:
    """The job of one stage instance."""

    key: str
    name: str
    parents: tuple[str, ...]  # keys of the instances whose success it needs
    worker: Worker
    resources: Resources


def error_file(folder: Path, job_id: str, start: int) -> Path:
    """Where the processes of a job's n-th start leave the line that the user can mend."""
    return folder / f"{job_id}_{start}_error.json"


def start_of(path: Path) -> int:
    """Which start of its job an error file is of."""
    return int(path.name.split("_")[-2])


def log_file(folder: Path, job_id: str, rank: int = 0) -> Path:
    """What a process of a job prints, over all its starts."""
    return folder / f"{job_id}_{rank}_log.out"


def check_folder(folder: Path, profile: Profile) -> None:
    """Raises RunError if other nodes cannot see `folder`."""
    for local in profile.node_local:
        if folder.is_relative_to(local):
            raise RunError(
                f"{folder}: {local} is each node's own; take a folder on a file system that all nodes share with --runs"
            )


@dataclass(frozen=True)
class Chain:
    """The jobs of a run that are to be submitted, parents first.

    queued: ids of jobs, by instance, that Slurm has already. leaving: ids of jobs that are just being ended; another
    job of the same instance begins after that. stale: ids of jobs that wait for one which has failed: they are
    cancelled. known: what jobs the run had when all this was found out.
    """

    folder: Path
    jobs: tuple[Job, ...]
    queued: Mapping[str, str]
    leaving: Mapping[str, str]
    stale: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, Sequence[str]] | None = None

    def scripts(self) -> list[str]:
        """The sbatch scripts as they would be submitted; ids that are not known yet read `ID_OF_stage/network`."""
        ids = {**self.queued, **{job.key: f"ID_OF_{job.key}" for job in self.jobs}}
        return [f"{_script(self._executor(job, ids))}\n" for job in self.jobs]

    def try_out(self) -> list[str]:
        """When and where Slurm would start the jobs, had they no parents. Raises SlurmError if it refuses one."""
        answers = []
        for job in self.jobs:
            with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
                file.write(_script(self._executor(job, {})))
                file.flush()
                try:
                    answer = call("sbatch", "--test-only", file.name, stderr=True)
                except SlurmError as error:
                    raise SlurmError(f"{job.key}: {error}") from error
            answers.append(f"{job.key}: {' '.join(answer.split())}")
        return answers

    def submit(self) -> dict[str, str]:
        """Submit the jobs and note their ids.

        Raises SlurmError, with nothing submitted, if one is refused or another command submits jobs of the same run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with try_lock(self.folder / "lock") as mine:
            if not mine or (self.known is not None and read_jobs(self.folder) != self.known):
                raise SlurmError(f"{self.folder}: another command has just submitted jobs of this run; try again")
            if self.stale:
                cancel(self.stale.values())
            return self._submit()

    def _submit(self) -> dict[str, str]:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        ids: dict[str, str] = {}
        try:
            for job in self.jobs:
                executor = self._executor(job, {**self.queued, **ids})
                with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what it raises
                    ids[job.key] = executor.submit(job.worker).job_id
                write_job(self.folder, job.key, ids[job.key])
        except BaseException as error:
            if ids:
                cancel(ids.values())
            if isinstance(error, FailedJobError | FailedSubmissionError):
                raise SlurmError(f"{job.key}: {complaint('sbatch', str(error))}; nothing was submitted") from error
            raise
        return ids

    def _executor(self, job: Job, ids: Mapping[str, str]) -> SlurmExecutor:
        parents = [ids[parent] for parent in job.parents if parent in ids]
        conditions = [f"afterok:{':'.join(parents)}"] if parents else []
        conditions += [f"afterany:{self.leaving[job.key]}"] if job.key in self.leaving else []
        return _executor(job, self.folder, ",".join(conditions))


def _script(executor: SlurmExecutor) -> str:
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def _executor(job: Job, folder: Path, dependency: str) -> SlurmExecutor:
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # scripts can be written without Slurm

    resources = job.resources
    ranged = {"nodes": resources.nodes} if not resources.nodes.isdecimal() else {}
    parameters: dict[str, Any] = {
        "job_name": job.name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "nodes": int(resources.nodes.partition("-")[0]),
        "ntasks_per_node": resources.tasks_per_node,
        "gpus_per_node": resources.gpus_per_node or None,
        "cpus_per_task": resources.cpus_per_task,
        "mem": f"{resources.mem_gb}G" if resources.mem_gb else None,
        "time": resources.timeout_min,
        "signal_delay_s": resources.signal_delay_s,
        "dependency": dependency or None,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": _setup(resources),
        # Current Slurm's srun does not take over sbatch's CPUs per task.
        "srun_args": [
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={resources.cpus_per_task}",
            f"--cpu-bind={resources.cpu_bind}",
        ],
        "teardown": _teardown(folder, resources.retries),
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **ranged, **resources.sbatch},
    }
    executor = Executor(folder, max_num_timeout=MANY_TIMEOUTS)
    executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    executor.parameters["wckey"] = None  # submitit's default is its own name
    return executor


def _setup(resources: Resources) -> list[str]:
    environment = {
        "OMP_NUM_THREADS": str(resources.cpus_per_task),
        "GOWIDE_COLLECTIVE_TIMEOUT_S": str(resources.collective_timeout_s),
        **resources.environment,
    }
    return [*resources.setup, *(f"export {name}={shlex.quote(value)}" for name, value in environment.items())]


def _teardown(folder: Path, retries: int) -> list[str]:
    """Queue the job again when a process crashed, hung or was killed, unless it left an error for the user to mend."""
    return [
        "status=$?",
        f"# a process crashed, hung or was killed, with nothing for the user to mend: again, {retries} times at most",
        f"job={shlex.quote(str(folder))}/$SLURM_JOB_ID",
        'if [ $status -ne 0 ] && [ ! -e "${job}_${SLURM_RESTART_COUNT:-0}_error.json" ] &&',
        f'   [ "$(cat "${{job}}_retries" 2> /dev/null | wc -l)" -lt {retries} ]; then',
        '  date >> "${job}_retries"',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $status",
    ]
