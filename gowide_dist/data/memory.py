"""The memory that is left to this process."""

from pathlib import Path


def available_memory_bytes() -> int:
    """Bytes free on the machine, or fewer where a control group (a container, a Slurm job) limits this process."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([available, *_cgroup_headrooms()])


def _cgroup_headrooms() -> list[int]:
    """Limit minus use, in bytes, of this process's control groups (version 2), from its own up to the root.

    The kernel counts cached files as used, but frees that memory on demand.
    """
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
            headrooms.append(int(text) - int(use.read_text()) + _cached_files(folder / "memory.stat"))
        if folder == root:
            break
    return headrooms


def _cached_files(stat: Path) -> int:
    values = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(values.get("inactive_file", 0)) + int(values.get("active_file", 0))
