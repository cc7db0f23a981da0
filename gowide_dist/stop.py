"""Signals that ask a process to stop: training saves at the next step and ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType

from gowide_dist.errors import UserError

_PR_SET_PDEATHSIG = 1
# Slurm's warning before the end of an allocation; a site may have another one, by submitit's variable.
PREEMPT_VARIABLE = "SUBMITIT_PREEMPT_SIGNAL"
_warning = os.environ.get(PREEMPT_VARIABLE, "").strip() or "USR2"
_catchable = {name: number for name, number in signal.Signals.__members__.items() if name not in ("SIGKILL", "SIGSTOP")}
WARNING_SIGNAL = _catchable.get(f"SIG{_warning}", signal.SIGUSR2)
_received = 0  # the greatest number so far: SIGTERM (15, the end) outweighs SIGUSR2 (12, a warning) and SIGINT (2)


class Stopped(Exception):  # noqa: N818 -- no error
    """All processes have agreed to stop, and the training state is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def listen() -> None:
    """Record Slurm's warning, SIGTERM, SIGINT and SIGHUP (a closed terminal) from now on, instead of ending.

    Slurm sends its warning to every process of a job, also to those that torch.compile starts to compile in, which
    would die of it. A process inherits which signals are blocked: so the warning is blocked, and a thread waits for it.
    Raises UserError if the site's warning is no signal that a process can wait for.
    """
    if f"SIG{_warning}" not in _catchable:
        raise UserError(f"{PREEMPT_VARIABLE}={_warning}: should be a signal that can be waited for: USR1, USR2 or TERM")
    for number in (WARNING_SIGNAL, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _record)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, _record)
    signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING_SIGNAL})
    threading.Thread(target=_wait_for_warnings, name="warnings", daemon=True).start()


def _wait_for_warnings() -> None:
    while True:
        _record(signal.sigwait({WARNING_SIGNAL}), None)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end at once if process `parent` already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def raise_on_sigterm(*others: signal.Signals) -> None:
    """Make the first SIGTERM, or other signal, raise SystemExit, so that `finally` leaves the files in order."""
    numbers = (signal.SIGTERM, *others)

    def leave(number: int, _frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, leave)


def received() -> int:
    """The greatest number of a signal that this process got, else 0."""
    return _received


def _record(signum: int, _frame: FrameType | None) -> None:
    global _received
    _received = max(_received, signum)
