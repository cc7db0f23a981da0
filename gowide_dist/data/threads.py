"""Threads that decode batches."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class DaemonThreads:
    """Threads that run the submitted functions in order.

    Unlike ThreadPoolExecutor's, which the interpreter joins at exit, they are daemons: one that is stuck in a hanging
    file system cannot keep the process alive.
    """

    def __init__(self, count: int, begin: Callable[[], None] | None = None):
        """`begin`: run by every thread before its first function; its exception becomes that of the function."""
        self._begin = begin
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"loader-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run `function` in the next free thread; the future gets its result or exception."""
        future: Future[Result] = Future()
        self._tasks.put((future, function))
        return future

    def close(self) -> None:
        """Wait until the submitted functions have run, and end the threads."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        begin = self._begin
        while task := self._tasks.get():
            future, function = task
            if future.set_running_or_notify_cancel():
                try:
                    if begin:
                        begin()
                        begin = None
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            del task, future, function  # an idle thread must not keep the last batch alive
