"""What rank 0 writes while all processes train: at once or in the background, one thing after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class Writer:
    """Writes on rank 0 alone; on other ranks it does nothing.

    A failure does not surface where it happens, for the other processes would wait for this one in their next
    collective. It is kept, nothing is written after it, and `check` raises it once all processes know of it.
    """

    def __init__(self, is_main: bool) -> None:
        self._is_main = is_main
        self._thread = ThreadPoolExecutor(1, "writer")
        self._failure: BaseException | None = None
        self._last: Future[None] | None = None

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def write(self, task: Callable[[], None]) -> None:
        """Do `task` now."""
        if self._is_main and self._failure is None:
            try:
                task()
            except BaseException as error:
                self._failure = error

    def write_later(self, task: Callable[[], None]) -> None:
        """Do `task` in the background, after those before it. What it writes may not change meanwhile."""
        self._last = self._thread.submit(self.write, task)

    @property
    def is_busy(self) -> bool:
        """Whether something is still to be written in the background."""
        return self._last is not None and not self._last.done()

    def wait(self) -> None:
        """Return when all is written."""
        self._thread.submit(int).result()  # the last in the line

    def check(self) -> None:
        """Wait until all is written. Raises the first failure."""
        self.wait()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        # A process that fails says so at once, however slow the disk; it wastes a file that is not complete.
        self._thread.shutdown(wait=error is None)
