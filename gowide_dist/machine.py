"""What this process may use of the machine, where control groups (containers, Slurm jobs) leave it a part."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

OWN_GROUPS = Path("/proc/self/cgroup")
HIERARCHIES = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores that this process may use: those that it is bound to, or fewer by a quota, rounded up."""
    cores = len(os.sched_getaffinity(0))
    for group in control_groups("cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # version 2, version 1
            with suppress(OSError, ValueError):  # no such file; "max": no quota
                quota, period = (int(number) for file in files for number in (group / file).read_text().split())
                if quota > 0:  # version 1 has -1 for none
                    cores = min(cores, math.ceil(quota / period))
    return cores


def control_groups(controller: str) -> Iterator[Path]:
    """Folders of the groups of this process, of versions 1 and 2, from its own up to the root: each sets a limit.

    A container may name its group as the host does, and see that group as the root; folders that it lacks are named
    too.
    """
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            roots = {HIERARCHIES / controllers, HIERARCHIES / controller}
        else:
            roots = set() if controllers else {HIERARCHIES, HIERARCHIES / "unified"}
        for root in roots:
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))
