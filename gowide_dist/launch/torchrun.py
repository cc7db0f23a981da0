"""torchrun as a process of its own, with its usual arguments: `python -m gowide_dist.launch.torchrun -m MODULE ...`.

It ends with the command that started it, its workers end with it, and it prints nothing: the workers have said what is
wrong. Exit status 2 if a worker raised a UserError, 128 and the signal's number after a signal.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from gowide_dist import stop
from gowide_dist.launch.local import ERROR_FILE_VARIABLE, LAUNCHER_VARIABLE, leave, leave_error


def main() -> int:
    """Run torchrun; a worker that fails without a line of its own gets one with its rank and exit code."""
    stop.end_with(int(os.environ[LAUNCHER_VARIABLE]))
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    try:
        run.main()
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if Path(os.environ[ERROR_FILE_VARIABLE]).exists():
            return 2
        leave_error(f"process {rank} ended with exit code {failure.exitcode}; see its error above")
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
