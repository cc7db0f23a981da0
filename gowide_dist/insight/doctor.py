"""Whether this machine can do it, and what to do if not. What may hang or take long runs in a child, in limited time.

`python -m gowide_dist.insight.doctor CHECK` is such a child; it prints its finding as JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement

import gowide_dist
from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.errors import UserError
from gowide_dist.launch.local import default_num_processes, num_gpus
from gowide_dist.launch.profile import Profile, load_profile
from gowide_dist.launch.queue import SlurmError, call
from gowide_dist.launch.slurm import check_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GOOD, WARNING, BAD = "good", "warning", "bad"
LIMIT_S = 180.0
CONSTRAINTS = Path(gowide_dist.__file__).parents[1] / "constraints.txt"
INSTALL = "pip install -c constraints.txt -e ."
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs"}
LITTLE_DISK_GB, LITTLE_MEMORY_GB = 10, 4


class Finding(NamedTuple):
    """What a check found. `mend`: the command, or the step, that mends it."""

    check: str
    state: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.check:12} {self.text}" + (f"\n{'':21} {self.mend}" if self.mend else "")


def examine(runs: Path, cluster: Path | None = None) -> Iterator[Finding]:
    """Check after check, each when it is done. Raises nothing that a check can say itself."""
    yield check_python()
    yield check_packages()
    yield check_cpus()
    yield check_memory()
    for name in CHILDREN:
        yield in_child(name)
    profile, finding = _read_profile(cluster)
    if finding:
        yield finding
    slurm = check_slurm(needed=profile is not None)
    yield slurm
    has_slurm = profile is not None or (slurm.state == GOOD and shutil.which("sbatch") is not None)
    if has_slurm and slurm.state == GOOD:
        yield check_accounting()
    yield check_folder_of_runs(runs, profile, has_slurm)
    yield check_disk(runs)


def check_python() -> Finding:
    """Its version, which pip has checked, and where it lives."""
    return Finding("python", GOOD, f"{platform.python_version()} in {sys.prefix}")


def check_packages(constraints: Path = CONSTRAINTS) -> Finding:
    """What pyproject.toml asks for is installed, in the versions of constraints.txt where that is at hand."""
    missing = []
    for text in metadata.requires("gowide_dist") or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            missing.append(f"{requirement} ({installed or 'absent'})")
    if missing:
        return Finding("packages", BAD, f"missing or too old: {', '.join(missing)}", INSTALL)
    if not constraints.is_file():
        return Finding("packages", GOOD, "all there; no constraints.txt to compare their versions with")
    pins = [line.split("==") for line in constraints.read_text().splitlines() if "==" in line]
    other = [
        f"{name} {there} instead of {pinned}"
        for name, pinned in pins
        if (there := _version(name)) is not None and there.split("+")[0] != pinned
    ]
    if other:
        return Finding("packages", WARNING, f"other versions than this was tested with: {', '.join(other)}", INSTALL)
    return Finding("packages", GOOD, f"all there, in the versions of {constraints.name}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_cpus() -> Finding:
    """Cores that this process may use, and the threads that training will take."""
    cores, present = len(os.sched_getaffinity(0)), os.cpu_count()
    processes = default_num_processes()
    text = f"{cores} of {present} cores; gowide run takes {processes} process{'es' * (processes > 1)} of "
    threads = int(os.environ.get("OMP_NUM_THREADS", "0") or 0) or max(1, cores // processes)
    text += f"{threads} thread{'s' * (threads > 1)}"
    quota = _cpu_quota()
    if quota is not None and quota < cores:
        return Finding(
            "cpus", WARNING, f"{text}, but a control group allows {quota:g} cores: threads will wait for each other",
            f"export OMP_NUM_THREADS={max(1, int(quota) // processes)}",
        )  # fmt: skip
    if processes * threads > cores:
        return Finding("cpus", WARNING, f"{text}, more than there are cores", "unset OMP_NUM_THREADS")
    load = os.getloadavg()[0]
    if load > cores:
        return Finding("cpus", WARNING, f"{text}; busy: {load:.1f} processes want to run", "top, to see whose they are")
    return Finding("cpus", GOOD, text)


def _cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def check_memory() -> Finding:
    """What is free."""
    free = available_memory_bytes() / 1e9
    if free < LITTLE_MEMORY_GB:
        return Finding("memory", WARNING, f"{free:.1f} GB are free", "gowide plan JOB, to see what a recipe needs")
    return Finding("memory", GOOD, f"{free:.1f} GB are free")


def in_child(name: str, limit_s: float = LIMIT_S) -> Finding:
    """The finding of a child process, or that it crashed or hung."""
    command = [sys.executable, "-m", "gowide_dist.insight.doctor", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return Finding(name, BAD, f"hung: nothing within {limit_s:g} s", f"{' '.join(command)}, to see where")
    try:
        return Finding(*json.loads(result.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        last = [line for line in result.stderr.splitlines() if line.strip()][-1:] or [f"status {result.returncode}"]
        return Finding(name, BAD, f"failed: {last[0].strip()}", CHILDREN[name][1])


def check_ffcv() -> Finding:
    """Write a file with our writer, read it back with our loader and with stock FFCV: the same pixels."""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="gowide-doctor-") as folder:
        sources = _encode(Path(folder), jpg_share=0.0)
        beton = Path(folder) / "data" / "val.beton"
        ours = _read(beton)
        import ffcv.loader
        from ffcv.fields.decoders import SimpleRGBImageDecoder
        from ffcv.transforms import ToTensor

        stream = ffcv.loader.Loader(
            str(beton), batch_size=len(sources), num_workers=1, order=ffcv.loader.OrderOption.SEQUENTIAL,
            pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()]},
        )  # fmt: skip
        theirs = next(iter(stream))[0].numpy()
        if not np.array_equal(ours, sources) or not np.array_equal(theirs, sources):
            return Finding("ffcv", BAD, "a file that was written is not read back the same", CHILDREN["ffcv"][1])
    return Finding("ffcv", GOOD, f"{metadata.version('ffcv')}: written, and read back the same by us and by stock FFCV")


def check_jpeg() -> Finding:
    """A JPEG through our decoder, against Pillow's."""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="gowide-doctor-") as folder:
        sources = _encode(Path(folder), jpg_share=1.0)
        differs = np.abs(_read(Path(folder) / "data" / "val.beton").astype(int) - sources).mean()
    if differs > 3:
        return Finding("jpeg", BAD, f"decoded images are {differs:.1f} of 255 off", CHILDREN["jpeg"][1])
    return Finding("jpeg", GOOD, f"libturbojpeg decodes, {differs:.1f} of 255 off at quality 90")


def check_gpus() -> Finding:
    """What torch sees, against what the driver sees; an all-reduce by NCCL."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        if num_gpus():
            return Finding("gpus", BAD, "the driver is there, but torch sees no GPU", "nvidia-smi; " + INSTALL)
        return Finding(
            "gpus", GOOD, f"no GPU: training uses the CPU, processes speak by gloo (torch {torch.__version__})"
        )
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("nccl", init_method=f"file://{file.name}", rank=0, world_size=1)
        value = torch.ones(1, device="cuda")
        dist.all_reduce(value)
        dist.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if value.item() != 1:
        return Finding("gpus", BAD, f"NCCL {version} adds wrongly", INSTALL)
    return Finding("gpus", GOOD, f"{len(names)}: {', '.join(sorted(set(names)))}; NCCL {version}")


# Checks that run in a child, and how to mend what crashes there.
CHILDREN: dict[str, tuple[Callable[[], Finding], str]] = {
    "ffcv": (
        check_ffcv,
        "apt install g++ pkg-config libopencv-dev libturbojpeg0-dev; pip install --force-reinstall ffcv",
    ),
    "jpeg": (check_jpeg, "apt install libturbojpeg0-dev; pip install --force-reinstall ffcv"),
    "gpus": (check_gpus, INSTALL),
}


def _encode(folder: Path, jpg_share: float) -> NDArray[np.uint8]:
    """Smooth images of our own, encoded into `folder`/data: [8, 32, 32, 3]."""
    import numpy as np
    from PIL import Image

    from gowide_dist.data.encode import Options, encode

    ramp = np.linspace(0, 200, 32)
    images = np.stack(
        [
            np.stack(
                [np.add.outer(ramp * a / 8, ramp * (8 - a) / 8), np.tile(ramp, (32, 1)), np.full((32, 32), 25 * a)]
            )
            for a in range(8)
        ]
    )
    images = images.transpose(0, 2, 3, 1).astype(np.uint8)
    for split in ("train", "val"):
        for index, image in enumerate(images):
            path = folder / "images" / split / f"class{index // 4}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    encode("imagefolder", folder / "data", folder / "images", Options(jpg_share=jpg_share, workers=1))
    return images


def _read(beton: Path) -> NDArray[np.uint8]:
    """All images of a file, by our loader."""
    from contextlib import closing

    from gowide_dist.data.loader import Loader
    from gowide_dist.timeline import Batching

    with closing(Loader(beton, Batching(8), train=False, resolution=32)) as loader:
        pixels: NDArray[np.uint8] = next(loader.batches()).images.numpy().copy()
    return pixels


def _read_profile(path: Path | None) -> tuple[Profile | None, Finding | None]:
    if path is None:
        return None, None
    try:
        profile = load_profile(path)
        if profile.partition and shutil.which("sinfo") and not call("sinfo", "-h", "-p", profile.partition).strip():
            return profile, Finding(
                "profile", BAD, f"{path}: no partition '{profile.partition}'", "sinfo -s, to see them"
            )
    except UserError as error:
        return None, Finding("profile", BAD, str(error), f"edit {path}")
    return profile, Finding("profile", GOOD, f"{path}")


def check_slurm(needed: bool) -> Finding:
    """Its commands, and whether the controller answers."""
    commands = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "srun")
    missing = [name for name in commands if shutil.which(name) is None]
    if len(missing) == len(commands) and not needed:
        return Finding("slurm", GOOD, "none here: `gowide run` trains on this machine")
    if missing:
        return Finding("slurm", BAD, f"missing: {', '.join(missing)}", "use a login node, or apt install slurm-client")
    try:
        version = call("sbatch", "--version").strip()
        call("squeue", "--me", "--noheader")
    except SlurmError as error:
        if not needed:
            text = "installed, but no controller answers; `gowide run` trains on this machine"
            return Finding("slurm", WARNING, text, "scontrol ping")
        return Finding("slurm", BAD, str(error), "scontrol ping; on this machine alone: make devcluster")
    return Finding("slurm", GOOD, f"{version}; the controller answers")


def check_accounting() -> Finding:
    """Without it a job that was killed is never seen to end."""
    try:
        call("sacct", "-X", "-n", "-P", "--format=JobID")
    except SlurmError as error:
        return Finding(
            "accounting", WARNING, f"{error}: ended jobs are forgotten", "ask for slurmdbd (AccountingStorageType)"
        )
    return Finding("accounting", GOOD, "sacct answers")


def check_folder_of_runs(runs: Path, profile: Profile | None, has_slurm: bool) -> Finding:
    """Writable, with locks; and seen by all nodes where there are nodes."""
    folder = _existing(runs.absolute())
    if runs.exists() and not runs.is_dir():
        return Finding("runs", BAD, f"{runs}: is no folder", "choose --runs DIR")
    kind = _file_system(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".gowide-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return Finding(
            "runs", BAD, f"{folder}: no file can be written and locked ({error.strerror})", "choose --runs DIR"
        )
    try:
        if profile:
            check_folder(runs.absolute(), profile)
    except UserError as error:
        return Finding("runs", BAD, str(error), "choose --runs DIR")
    if has_slurm and kind in LOCAL_FILE_SYSTEMS:
        return Finding(
            "runs", WARNING, f"{folder} is on {kind}, which other nodes are not likely to see", "choose --runs DIR"
        )
    return Finding("runs", GOOD, f"{folder}: {kind}, written and locked")


def check_disk(runs: Path) -> Finding:
    """Room for checkpoints."""
    folder = _existing(runs.absolute())
    free = shutil.disk_usage(folder).free / 1e9
    state = BAD if free < 1 else WARNING if free < LITTLE_DISK_GB else GOOD
    return Finding("disk", state, f"{free:,.1f} GB are free in {folder}", "" if state == GOOD else f"du -sh {folder}/*")


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _file_system(folder: Path) -> str:
    """The type of the mount that a folder lies on."""
    found = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if folder.is_relative_to(place) and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1]


def main(name: str) -> None:
    """Entry of a child."""
    print(json.dumps(CHILDREN[name][0]()))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
