"""The memory that is left to this process."""

import re
from pathlib import Path


def available_memory_bytes() -> int:
    """Bytes free on the machine, or fewer where a control group (a container, a Slurm job) limits this process."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(meminfo["MemAvailable"].split()[0]) * 1024, *_cgroup_headrooms()])


def _cgroup_headrooms() -> list[int]:
    """Limit minus use, in bytes, of this process's control groups (version 2), from its own up to the root.

    The kernel counts cached files as used, but frees that memory on demand.
    """
    own = re.search(r"^0::/(.*)", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    group = Path("/sys/fs/cgroup") / (own[1] if own else "")
    headrooms = []
    for folder in (group, *group.parents):
        limit = folder / "memory.max"
        if limit.exists() and (limit_bytes := limit.read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"]) + int(stat["active_file"])
            headrooms.append(int(limit_bytes) - int((folder / "memory.current").read_text()) + cached)
    return headrooms
