"""Progress of long-running commands: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_EVERY_S = 10.0
BAR_EVERY_S = 0.1

Item = TypeVar("Item")


class Track:
    """Progress of a task of `total` items, which are called `unit`, the first `start` of them done before.

    Rates are of `rate_unit`, of which an item has `per_thing`: steps can show images per second.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        *,
        start: int = 0,
        rate_unit: str = "",
        per_thing: int = 1,
        quiet: bool = False,
        stderr: bool = False,
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._rate_unit, self._per_thing = rate_unit or unit, per_thing
        self._start = start
        self._started = self._shown = time.monotonic()
        self._console = Console(quiet=quiet, stderr=stderr, highlight=False, markup=False)
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(name, total=total, completed=start, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar:
            with _ignoring_a_closed_terminal():
                self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` items are done. note: printed after the rate."""
        now = time.monotonic()
        if now - self._shown < (BAR_EVERY_S if self._bar else PLAIN_LINE_EVERY_S):
            return
        self._shown = now
        rate = (done - self._start) * self._per_thing / max(now - self._started, 1e-9)
        note = f"{rate:,.0f} {self._rate_unit}/s{'  ' + note if note else ''}"
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        else:
            left = (self._total - done) * self._per_thing / max(rate, 1e-9)
            self.line(f"{self._name}  {done:,}/{self._total:,} {self._unit}  {note}  {clock(left)} left")

    def line(self, text: str) -> None:
        """Print a line that stays above the bar."""
        with _ignoring_a_closed_terminal():
            self._console.print(text, soft_wrap=True)


@contextmanager
def _ignoring_a_closed_terminal() -> Iterator[None]:
    """Output to a closed terminal is lost, and the work goes on."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def say(text: str) -> None:
    """Print a line on stderr."""
    Console(stderr=True, highlight=False, markup=False).print(text, soft_wrap=True)


def track(items: Iterable[Item], name: str, total: int, unit: str = "images") -> Iterator[Item]:
    """Yield the items while showing their progress on stderr; at the end a line with the rate."""
    started = time.monotonic()
    done = 0
    with Track(name, total, unit, stderr=True) as progress:
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(done)
    seconds = max(time.monotonic() - started, 1e-9)
    say(f"{name}  {done:,} {unit} in {clock(seconds)}, {done / seconds:,.0f} {unit}/s")


def clock(seconds: float) -> str:
    """A duration as 0:42, 3:07 or 2:15:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
