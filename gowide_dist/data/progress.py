"""Progress of a long job: a bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL_S = 10.0

Item = TypeVar("Item")


def say(message: str) -> None:
    """One plain line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, markup=False).print(message)


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield the items, showing how many are done, how many a second, and the time left."""
    if Console(stderr=True).is_terminal:
        yield from _track_bar(items, title, total)
    else:
        yield from _track_lines(items, title, total)


def _track_bar(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    rate = TextColumn("{task.fields[rate]:,.0f}/s")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, rate=0.0)
        start = shown = time.monotonic()
        done = 0
        for done, item in enumerate(items, 1):
            yield item
            if time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                progress.update(task, completed=done, rate=done / (shown - start))
        progress.update(task, completed=done, rate=done / max(time.monotonic() - start, 1e-9))


def _track_lines(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    start = shown = time.monotonic()
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown > _PLAIN_INTERVAL_S:
            shown, rate = now, done / (now - start)
            say(f"{title}: {done:,} of {total:,}, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left")
    seconds = time.monotonic() - start
    say(f"{title}: {done:,} done in {seconds:.1f} s, {done / max(seconds, 1e-9):,.0f}/s")
