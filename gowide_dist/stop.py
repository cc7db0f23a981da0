"""Signals that ask a process to stop: training saves at the next step and ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1
_received = 0  # the greatest number so far: SIGTERM (15, the end) outweighs SIGUSR2 (12, a warning) and SIGINT (2)


class Stopped(Exception):  # noqa: N818 -- no error
    """All processes have agreed to stop, and the training state is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def listen() -> None:
    """Install handlers that record SIGUSR2 (Slurm's warning), SIGTERM, SIGINT and SIGHUP (a closed terminal)."""
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _record)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, _record)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end at once if process `parent` already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def raise_on_sigterm() -> None:
    """Make SIGTERM raise SystemExit, so that `finally` deletes files that are half written."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def received() -> int:
    """The greatest number of a signal that this process got, else 0."""
    return _received


def _record(signum: int, _frame: FrameType | None) -> None:
    global _received
    _received = max(_received, signum)
