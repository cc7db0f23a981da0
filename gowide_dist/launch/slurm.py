"""One Slurm job through submitit: its sbatch script (`sbatch_script`), what its processes execute, its files."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gowide_dist.errors import RunError, UserError
from gowide_dist.launch.local import ERROR_FILE_VARIABLE, leave, leave_error, read_error
from gowide_dist.launch.profile import Profile, Resources
from gowide_dist.launch.queue import SlurmError, complaint, without_options_of_the_shell
from gowide_dist.machine import mend_loopback
from gowide_dist.stop import WARNING_SIGNAL

if TYPE_CHECKING:
    from submitit import SlurmExecutor

MANY_TIMEOUTS = 10_000  # a stage goes on over as many allocations as it needs
FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below the ports that Linux gives to outgoing connections
LEFT_FOR_SLURM_S = 60  # longer than Slurm takes to end a process after SIGTERM (KillWait, 30 s by default)
# The batch script queues the job again, for it runs on the host: a task's container need not have Slurm's commands. The
# error file of this start holds the line of a UserError, which trying again would not fix.
TEARDOWN = """\
status=$?
job={folder}/$SLURM_JOB_ID
start="${{job}}_${{SLURM_RESTART_COUNT:-0}}"
limit="timeout --signal=KILL 60"
notify() {{
  {notify}
}}
refused() {{
  notify failed
  touch "${{job}}_refused"
  echo "gowide: Slurm refuses to queue this job again; gowide submit continues from what is saved" >&2
  exit 1
}}
{again}
if [ -e "${{start}}_saved" ]; then
  again  # before the end of the allocation
elif [ $status -ne 0 ] && [ ! -e "${{start}}_error.json" ] &&
     [ "$(cat "${{job}}_retries" 2> /dev/null | wc -l)" -lt {retries} ]; then
  date >> "${{job}}_retries"  # a process crashed, hung or was killed, with nothing for the user to fix
  again
fi
[ $status -eq 0 ] && notify done || notify failed
exit $status
"""
# The profile's own line, which may fail, or hang, without harm to the job.
NOTIFY = """\
GOWIDE_STATE=$1 GOWIDE_RUN={run} GOWIDE_STAGE={stage} $limit bash -c {line} || true"""
# Slurm ends a script that has queued its job again, and what it runs, by SIGTERM and, KillWait (30 s by default) later,
# SIGKILL. `timeout` hears SIGTERM, whatever the script ignores.
REQUEUE = """\
again() {
  trap '' TERM
  limit=
  scontrol requeue "$SLURM_JOB_ID" || refused
  notify requeued
  exit 0
}"""
# Where a site forbids requeueing: a job of the same script, for which the children of this one then wait.
FOLLOW_UP = """\
again() {
  local next file child dependency
  trap '' TERM  # what has begun is also noted when the grace time of a preemption ends
  limit=
  next=$(
    id=$SLURM_JOB_ID
    unset $(compgen -v | grep -E '^(SLURM|SBATCH)_' | grep -vE '^SLURM_(CONF|CONF_SERVER|JWT)$')  # this job's
    sbatch --parsable --dependency="afterany:$id" "${job}_submission.sh"
  ) || refused
  next=${next%%;*}
  for file in submission.sh submitted.pkl retries; do
    [ ! -e "${job}_$file" ] || cp "${job}_$file" "${job%/*}/${next}_$file"
  done
  echo "$next" > "${job}_next"
  squeue --me --noheader --states=PENDING --format='%i %E' | while read -r child dependency; do
    if [ "$child" != "$next" ] && grep -q ":$SLURM_JOB_ID\\b" <<< "$dependency"; then
      scontrol update JobId="$child" Dependency="$(sed "s/([^)]*)//g; s/:$SLURM_JOB_ID\\b/:$next/g" <<< "$dependency")"
    fi
  done
  notify requeued
  exit 0
}"""


@dataclass(frozen=True)
class Worker:
    """What every process of a job executes: `main(arguments)` of a module. submitit pickles it for the job.

    A requeue starts the same pickle again: training finds its own checkpoint.
    """

    module: str
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Describe the process group to torch.distributed and run. After the warning a marker asks for a requeue."""
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        environment = JobEnvironment()
        start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        # Jobs that share a node have different ids and so different ports. A job that starts again takes another port,
        # for its last one may still be closing, and one that is far from its neighbours': 7919 is a prime, so that
        # multiples of it modulo NUM_PORTS repeat only after NUM_PORTS starts.
        port = FIRST_PORT + (int(environment.raw_job_id) + 7919 * start) % NUM_PORTS
        os.environ["MASTER_PORT"] = str(port)
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ[ERROR_FILE_VARIABLE] = str(error_file(environment.paths.folder, environment.raw_job_id, start))
        try:
            mend_loopback(environment.hostnames)
        except UserError as error:
            leave_error(str(error))
            leave(2)
        status = importlib.import_module(self.module).main(self.arguments)
        signal.signal(WARNING_SIGNAL, signal.SIG_IGN)  # during interpreter shutdown it would kill this process
        if status == 128 + WARNING_SIGNAL:
            _ask_for_another_start()
            leave(0)  # interpreter shutdown would take a second or more of the grace time of a preemption
        elif status == 2:
            sys.stderr.write(f"{read_error(Path(os.environ[ERROR_FILE_VARIABLE])) or 'full disk'}\n")
        elif status == 128 + signal.SIGTERM:
            # SIGTERM comes before a job is cancelled, preempted or requeued: Slurm knows which, and ends this process.
            time.sleep(LEFT_FOR_SLURM_S)
        if status:
            leave(status)

    def checkpoint(self) -> NoReturn:
        """What submitit calls on rank 0 at a warning before training listens to it: leave, as training does."""
        _ask_for_another_start()
        leave(1)  # srun ends the others


def _ask_for_another_start() -> None:
    """In a job: leave the marker at which the batch script queues the job again."""
    from submitit import JobEnvironment

    environment, start = JobEnvironment(), os.environ.get("SLURM_RESTART_COUNT", "0")
    (environment.paths.folder / f"{environment.raw_job_id}_{start}_saved").touch()


@dataclass(frozen=True)
class Job:
    """The job of stage instances: of one stage, trained together."""

    keys: tuple[str, ...]
    name: str
    worker: Worker
    resources: Resources
    parents: tuple[str, ...] = ()  # keys of the instances whose success it needs
    environment: Mapping[str, str] = field(default_factory=dict)
    code: Path | None = None  # folder of the copied package that it imports; default: the installed one

    @property
    def key(self) -> str:
        """What it trains, as the command line names it."""
        return self.keys[0] if len(self.keys) == 1 else self.keys[0].partition("/")[0]


def error_file(folder: Path, job_id: str, start: int) -> Path:
    """Where the processes of a job's n-th start write the line of a UserError."""
    return folder / f"{job_id}_{start}_error.json"


def start_of(path: Path) -> int:
    """The number of the start that wrote an error file."""
    return int(path.name.split("_")[-2])


def is_refused(folder: Path, job_id: str) -> bool:
    """Whether Slurm refused to queue a job again, or to take its follow-up."""
    return (folder / f"{job_id}_refused").exists()


def log_file(folder: Path, job_id: str, rank: int = 0) -> Path:
    """The output of a process of a job, over all its starts."""
    return folder / f"{job_id}_{rank}_log.out"


def check_folder(folder: Path, profile: Profile) -> None:
    """Raises RunError if other nodes cannot see `folder`, or if Slurm would write its logs elsewhere."""
    if "%" in str(folder):
        raise RunError(f"{folder}: Slurm replaces what follows a % in names of logs; take another folder with --runs")
    for local in profile.node_local:
        if folder.is_relative_to(local):
            raise RunError(f"{folder}: {local} is local to each node; take a folder that all nodes share with --runs")


def sbatch_script(job: Job, folder: Path, dependency: str) -> str:
    """The script that sbatch gets; `folder` is for submitit's files and the logs, `dependency` as sbatch has it."""
    executor = _executor(job, folder, dependency)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def submit_job(job: Job, folder: Path, dependency: str) -> str:
    """Submit a job; its id. Raises SlurmError if Slurm refuses it."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        # submitit repeats on stderr what it raises.
        with without_options_of_the_shell(), contextlib.redirect_stderr(io.StringIO()):
            job_id: str = _executor(job, folder, dependency).submit(job.worker).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(complaint("sbatch", str(error))) from error
    return job_id


def _notify(job: Job, folder: Path) -> str:
    """What the batch script runs at the end of a start, with the state as its first argument."""
    if not job.resources.notify:
        return "true"
    words = {"run": str(folder.parent), "stage": job.key, "line": job.resources.notify}
    return NOTIFY.format(**{name: shlex.quote(word) for name, word in words.items()})


def _executor(job: Job, folder: Path, dependency: str) -> SlurmExecutor:
    from submitit import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # submitit asks whether Slurm is there: scripts can be written without

    resources, num_cpus, gpus = job.resources, job.resources.cpus_per_task, job.resources.gpus_of_node
    own = {
        "requeue" if resources.requeue else "no-requeue": True,
        "kill-on-invalid-dep": "yes",
        "nodes": resources.nodes,
    }
    environment = {
        "OMP_NUM_THREADS": str(num_cpus),
        "GOWIDE_COLLECTIVE_TIMEOUT_S": str(resources.collective_timeout_s),
        **job.environment,
        **resources.environment,
    }
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    if job.code:
        exports.append(f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
        exports.append("export PYTHONSAFEPATH=1")  # else `python -m` prefers the folder where the command was given
    exports.append("set +eu  # of the setup: they would end this script before the teardown")
    executor = Executor(folder, max_num_timeout=MANY_TIMEOUTS, python=resources.python)
    as_sbatch_has_them = {"partition", "account", "qos", "constraint", "exclude", "cpus_per_task", "signal_delay_s"}
    executor.update_parameters(
        **resources.model_dump(include=as_sbatch_has_them),
        job_name=job.name,
        nodes=int(resources.nodes.partition("-")[0]),
        ntasks_per_node=resources.tasks_per_node,
        **{"gpus_per_node": gpus} if resources.gpu_option == "gpus-per-node" else {"gres": gpus and f"gpu:{gpus}"},
        mem=resources.mem,
        time=resources.timeout_min,
        dependency=dependency or None,
        wckey=None,  # submitit's default is its own name
        stderr_to_stdout=True,
        setup=[*resources.setup, *exports],
        # srun does not inherit sbatch's --cpus-per-task since Slurm 22.05.
        srun_args=[
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={num_cpus}",
            f"--cpu-bind={resources.cpu_bind}",
            *resources.srun,
        ],
        teardown=TEARDOWN.format(
            folder=shlex.quote(str(folder)),
            again=REQUEUE if resources.requeue else FOLLOW_UP,
            notify=_notify(job, folder),
            retries=resources.retries,
        ).splitlines(),
        additional_parameters={**own, **resources.sbatch},
    )
    return executor
