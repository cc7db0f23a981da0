"""Python's garbage collector, which need not search the half a million objects that importing torch makes.

None of them is garbage, yet it looks at them again and again while they are made, and once more when the process ends:
a second and two seconds of every process.
"""

from __future__ import annotations

import atexit
import gc

_USUAL = gc.get_threshold()
_SELDOM = 100_000  # objects made and not yet freed before it looks


def collect_seldom() -> None:
    """For the start of a command: look seldom, until `collect_as_usual`, and not at all when the process ends."""
    gc.set_threshold(_SELDOM)
    atexit.register(gc.freeze)


def collect_as_usual() -> None:
    """Before a long computation: look at what comes as usual, and no more at what is there."""
    if gc.get_threshold() != _USUAL:
        gc.freeze()
        gc.set_threshold(*_USUAL)
