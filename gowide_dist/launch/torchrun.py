"""torchrun as a process of its own, with its usual arguments: `python -m gowide_dist.launch.torchrun -m MODULE ...`.

It ends with the command that started it, its workers end with it, and it prints nothing: the workers have said what is
wrong. Exit status 2 if a worker raised a UserError, 128 and the signal's number after a signal.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gowide_dist import stop
from gowide_dist.launch.local import ERROR_FILE_VARIABLE, LAUNCHER_VARIABLE, leave, leave_error

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

AFTER_FAILURE_S = 3
MEANINGS = {
    signal.SIGKILL: (
        ", usually out of memory (see dmesg, or the container's limit): `gowide plan` estimates what a process "
        "needs; fewer processes, or stages.STAGE.optim.accumulate, take less"
    ),
    signal.SIGBUS: ", usually because shared memory or a disk is full: see df -h, /dev/shm included",
    signal.SIGILL: ", usually because the CPU is older than what PyTorch or FFCV was built for: see `gowide doctor`",
    signal.SIGSEGV: ", a crash in compiled code: see `gowide doctor`; PYTHONFAULTHANDLER=1 shows where",
    signal.SIGABRT: (
        ", usually because it waited for another process longer than the collective timeout "
        "(GOWIDE_COLLECTIVE_TIMEOUT_S): see the errors above"
    ),
}


def main() -> int:
    """Run torchrun; a worker that fails without a line of its own gets one with its rank and exit code."""
    stop.end_with(int(os.environ[LAUNCHER_VARIABLE]))
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    # After a failure torchrun gives the other workers 30 s to end, for which it has no option. They cannot: they wait
    # in a collective for the one that has failed. A stop that the user asks for passes its own timeout.
    PContext.close.__defaults__ = (None, AFTER_FAILURE_S)
    try:
        run.main()
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        if Path(os.environ[ERROR_FILE_VARIABLE]).exists():
            return 2
        leave_error(describe(error.failures.values()))
        return 1
    return 0


def describe(failures: Iterable[ProcessFailure]) -> str:
    """Which process failed first, and how: one that was killed, for the others then lost their connections to it.

    Those that torchrun has ended afterwards, by SIGTERM and then by SIGKILL, are left out.
    """
    failures = sorted(failures, key=lambda failure: (failure.exitcode == -signal.SIGTERM, failure.timestamp))
    first = [failure for failure in failures if failure.timestamp < failures[0].timestamp + AFTER_FAILURE_S - 1]
    # a signal's exit code is negative
    cause = min(first, key=lambda failure: (failure.exitcode == -signal.SIGTERM, failure.exitcode))
    return f"process {cause.local_rank} {explain(cause.exitcode)}"


def explain(exitcode: int) -> str:
    """What became of a process, what that mostly means and what to do."""
    if exitcode >= 0:
        return f"ended with exit code {exitcode}; see its error above"
    signum = signal.Signals(-exitcode)
    return f"was killed by {signum.name}{MEANINGS.get(signum, '')}"


if __name__ == "__main__":
    leave(main())
