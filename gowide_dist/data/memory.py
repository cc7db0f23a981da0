"""The memory that is left to this process."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gowide_dist.machine import control_groups

# Limit, use, and what memory.stat calls the cached files in it: of control groups of version 2, and of version 1.
_FILES = {
    "memory.max": ("memory.current", ("inactive_file", "active_file")),
    "memory.limit_in_bytes": ("memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def available_memory_bytes() -> int:
    """Bytes free on the machine, or fewer where a control group (a container, a Slurm job) limits this process."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(meminfo["MemAvailable"].split()[0]) * 1024, *_headrooms()])


def _headrooms() -> Iterator[int]:
    """Limit minus use, in bytes, of this process's control groups.

    The kernel counts cached files as used, but frees that memory on demand.
    """
    for group in control_groups("memory"):
        for limit, (used, cached) in _FILES.items():
            with suppress(OSError, ValueError):  # no such file; "max": no limit
                limit_bytes = int((group / limit).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield limit_bytes - int((group / used).read_text()) + sum(int(stat[name]) for name in cached)
