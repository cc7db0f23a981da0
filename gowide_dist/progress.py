"""Progress of long-running commands: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_EVERY_S = 10.0
BAR_EVERY_S = 0.1
FORCING = ("FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "GITHUB_ACTIONS")  # rich and typer take a file for a terminal

Item = TypeVar("Item")


class Track:
    """Progress of a task of `total` items, which are called `unit`, the first `start` of them done before.

    batch_size: the items are steps of this many images each, and the rate is in images.
    """

    def __init__(
        self, name: str, total: int, unit: str, *,
        start: int = 0, batch_size: int | None = None, quiet: bool = False, stderr: bool = False,
    ) -> None:  # fmt: skip
        self._name, self._total, self._unit, self._start = name, total, unit, start
        self._per_item, self._rate_unit = batch_size or 1, "images" if batch_size else unit
        self._started = self._shown = time.monotonic()
        self._console = Console(quiet=quiet, stderr=stderr, highlight=False, markup=False)
        self._has_bar = self._console.is_terminal and not quiet
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._has_bar)
        self._task = self._bar.add_task(name, total=total, completed=start, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._has_bar:
            with _ignoring_a_closed_terminal():
                self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` items are done. note: printed after the rate."""
        now = time.monotonic()
        if now - self._shown < (BAR_EVERY_S if self._has_bar else PLAIN_LINE_EVERY_S):
            return
        self._shown = now
        rate = (done - self._start) / (now - self._started)
        note = f"{rate * self._per_item:,.0f} {self._rate_unit}/s{'  ' + note if note else ''}"
        if self._has_bar:
            self._bar.update(self._task, completed=done, note=note)
        else:
            left = clock((self._total - done) / max(rate, 1e-9))
            self.line(f"{self._name}  {done:,}/{self._total:,} {self._unit}  {note}  {left} left")

    def line(self, text: str) -> None:
        """Print a line that stays above the bar."""
        with _ignoring_a_closed_terminal():
            self._console.print(text, soft_wrap=True)


@contextlib.contextmanager
def _ignoring_a_closed_terminal() -> Iterator[None]:
    """Output to a closed terminal, a closed pipe or a full disk is lost, and the work goes on."""
    try:
        yield
    except SystemExit:  # what rich makes of a closed pipe
        pass
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE, errno.ENOSPC):
            raise


def say(text: str) -> None:
    """Print a line on stderr."""
    Track("", 0, "", stderr=True).line(one_line(text))


def one_line(text: object) -> str:
    """With the line breaks that names of files may have written as \\n."""
    return "\\n".join(str(text).splitlines())


@functools.cache
def say_once(text: str) -> None:
    """`say`, unless it was said already: several seeds of a recipe have the same to say."""
    say(text)


def track(items: Iterable[Item], name: str, total: int, unit: str = "images") -> Iterator[Item]:
    """Yield the items while showing their progress on stderr; at the end a line with the rate."""
    started, done = time.monotonic(), 0
    with Track(name, total, unit, stderr=True) as progress:
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(done)
    seconds = max(time.monotonic() - started, 1e-9)
    say(f"{name}  {done:,} {unit} in {clock(seconds)}, {done / seconds:,.0f} {unit}/s")


def write_text_only() -> None:
    """Called first in a process: a file or a pipe gets text without control codes, in whatever encoding.

    Characters that the encoding lacks, and bytes of file names that are no text, become question marks.
    """
    for name in FORCING:
        os.environ.pop(name, None)  # for child processes too
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def clock(seconds: float) -> str:
    """A duration as 0:42, 3:07 or 2:15:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
