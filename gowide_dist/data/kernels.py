"""numba's compiler for loops over images, with its cache on disk where there is a place for one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Any:
    """A function compiled when it is first called, which holds no lock then.

    numba caches it in the package's folder, else in the user's home. Where neither can be written, or a disk is full,
    it is compiled in every process anew. A cache that is damaged, or of other code, is emptied.
    """
    try:
        compiled = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder can be written
        return numba.njit(nogil=True, error_model="numpy")(function)
    cache = compiled._cache  # type: ignore[attr-defined]

    @contextmanager
    def guard() -> Iterator[None]:
        """In place of numba's own, which lets errors of the file system pass on Windows alone."""
        try:
            yield
        except OSError:
            pass
        except Exception:  # numba unpickles what it finds: anything may come of a file that was cut off
            with suppress(OSError):
                cache.flush()

    cache._guard_against_spurious_io_errors = guard
    return compiled


def cache_folder() -> str | None:
    """Where the code of kernels is cached, if it can be."""
    path: str | None = kernel(lambda: None).stats.cache_path
    return path
