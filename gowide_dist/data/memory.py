"""How much memory this process may still take."""

from pathlib import Path


def available_memory_bytes() -> int:
    """What the machine has free, or less where a control group (a container, a Slurm job) limits this process."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([available, *_cgroup_headrooms()])


def _cgroup_headrooms() -> list[int]:
    """Limit less use of this process's version 2 control groups, from its own up to the root."""
    root = Path("/sys/fs/cgroup")
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    group = root / own
    headrooms = []
    for folder in (group, *group.parents):
        limit, use = folder / "memory.max", folder / "memory.current"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            headrooms.append(int(text) - int(use.read_text()))
        if folder == root:
            break
    return headrooms
