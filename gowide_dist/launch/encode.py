"""`gowide encode` as a Slurm job: one task with the CPUs of a node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from gowide_dist.data.encode import Options, encode
from gowide_dist.errors import UserError, fixable
from gowide_dist.launch.chain import Action, Chain, Planned, action_for
from gowide_dist.launch.code import code_folder
from gowide_dist.launch.local import leave_error
from gowide_dist.launch.profile import Profile
from gowide_dist.launch.queue import ENCODE, encode_folder, job_name, newest_jobs
from gowide_dist.launch.slurm import Job, Worker, check_folder
from gowide_dist.progress import write_text_only
from gowide_dist.stop import WARNING_SIGNAL, raise_on_sigterm


def encode_job(
    dataset: str, out: Path, root: Path | None, options: Options, profile: Profile, *, rehearse: bool
) -> Chain:
    """The job of an encode, unless Slurm has it already. Its files are in `OUT.slurm`. `rehearse` does not ask Slurm.

    There is a reader for each CPU of the job unless `options` says another number. Raises UserError if the nodes would
    not see the folder, or if Slurm does not answer.
    """
    out = out.absolute()
    folder = encode_folder(out)
    check_folder(folder, profile)
    state = None if rehearse else newest_jobs(folder, out.name).get(ENCODE)
    resources = profile.encode_resources()
    options = replace(options, workers=options.workers or resources.cpus_per_task)
    worker = Worker(__name__, (dataset, str(out), str(root.absolute()) if root else "", json.dumps(asdict(options))))
    action = action_for(state)
    job = (
        None
        if action is Action.WAIT_FOR
        else Job((ENCODE,), job_name(out.name, ENCODE), worker, resources, code=code_folder(folder))
    )
    return Chain(folder, {ENCODE: Planned(action, state.job_id if state else None, job)})


def main(arguments: Sequence[str]) -> int:
    """Entry of the job: exit status 2 for a UserError, which goes to the job's log.

    At the warning before the time limit it ends, to be queued again and to go on from what it has.
    """
    write_text_only()
    raise_on_sigterm(WARNING_SIGNAL)
    dataset, out, root, options = arguments
    try:
        encode(dataset, Path(out), Path(root) if root else None, Options(**json.loads(options)))
    except SystemExit as stopped:  # by a signal
        return int(stopped.code or 0)
    except (UserError, OSError) as error:
        line = str(error) if isinstance(error, UserError) else fixable(error)
        if line is None:
            raise
        leave_error(line if isinstance(error, UserError) else f"{out}: {line}")
        return 2
    return 0
