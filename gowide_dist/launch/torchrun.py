"""torchrun as a process of its own, with its usual arguments: `python -m gowide_dist.launch.torchrun -m MODULE ...`.

It ends with the command that started it, its workers end with it, and it prints nothing: the workers have said what is
wrong. Exit status 2 if a worker raised a UserError, 128 and the signal's number after a signal.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gowide_dist import stop
from gowide_dist.errors import fixable
from gowide_dist.launch.local import ERROR_FILE_VARIABLE, LAUNCHER_VARIABLE, STOP_SIGNALS, explain, leave, leave_error

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

AFTER_FAILURE_S = 3


def main() -> int:
    """Run torchrun; a worker that fails without a line of its own gets one with its rank and exit code."""
    stop.end_with(int(os.environ[LAUNCHER_VARIABLE]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torchrun has its own handler: no traceback
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
        stopped = [f.exitcode - 128 for f in error.failures.values() if f.exitcode - 128 in STOP_SIGNALS]
        if stopped and all(
            f.exitcode - 128 in STOP_SIGNALS or f.exitcode == -signal.SIGTERM for f in error.failures.values()
        ):
            return 128 + max(stopped)  # a signal reached a worker alone: all have saved
        leave_error(describe(error.failures.values()))
        return 1
    except OSError as error:  # torchrun's own files, in the temporary folder
        if not (line := fixable(error)):
            raise
        leave_error(f"{tempfile.gettempdir()}: {line}")
        return 2
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


if __name__ == "__main__":
    leave(main())
