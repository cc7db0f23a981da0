"""How far a long command is: a bar with rates and time left on a terminal, plain lines where there is none."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_LINE_EVERY_S = 10.0


class Track:
    """Progress of one task of `total` things of a kind (`unit`), from `start` on.

    Rates count `per_thing` of `rate_unit` for each thing, so that steps can show images per second.
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
    ) -> None:
        from rich.console import Console  # slow, and not for the commands of login nodes
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._name, self._total, self._unit = name, total, unit
        self._rate_unit, self._per_thing = rate_unit or unit, per_thing
        self._start, self._done = start, start
        self._started = self._last_line = time.monotonic()
        self._console = Console(quiet=quiet, highlight=False)
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

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """`done` things are done; `note` stands behind the rate."""
        self._done = done
        now = time.monotonic()
        rate = (done - self._start) * self._per_thing / max(now - self._started, 1e-9)
        note = f"{rate:,.0f} {self._rate_unit}/s{'  ' + note if note else ''}"
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            left = (self._total - done) * self._per_thing / max(rate, 1e-9)
            self._console.print(
                f"{self._name}  {done:,}/{self._total:,} {self._unit}  {note}  {clock(left)} left", soft_wrap=True
            )

    def line(self, text: str) -> None:
        """Print a line that stays."""
        (self._bar.console if self._bar else self._console).print(text, soft_wrap=True)


def clock(seconds: float) -> str:
    """A time span as people write it: 0:42, 3:07, 2:15:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
