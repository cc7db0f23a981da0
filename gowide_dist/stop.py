"""A request to stop, by signal: training saves at the next step and leaves."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1
_received = 0  # the greatest number, so that SIGTERM (the end) outweighs SIGUSR2 (a warning) and SIGINT


class Stopped(Exception):  # noqa: N818 -- no error
    """All processes have agreed to stop, and the training state is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def listen() -> None:
    """From now on note SIGUSR2 (Slurm's warning), SIGTERM, SIGINT and SIGHUP (no terminal any more), and live on."""
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        signal.signal(signal.SIGHUP, _note)


def end_with(parent: int) -> None:
    """From now on end, by SIGKILL, when the parent process ends; at once if it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def raise_on_sigterm() -> None:
    """From now on SIGTERM raises SystemExit, so that what is half written is cleared away."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def received() -> int:
    """The number of the signal that this process got, else 0."""
    return _received


def _note(signum: int, _frame: FrameType | None) -> None:
    global _received
    _received = max(_received, signum)
