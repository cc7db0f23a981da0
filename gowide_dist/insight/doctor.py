"""Checks of this machine, each with what mends it. What may crash or hang runs in a child process with a time limit.

`python -m gowide_dist.insight.doctor CHECK...` is such a child: it prints findings as JSON, one a line.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gowide_dist
from gowide_dist.bench import cpu_name
from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.errors import UserError
from gowide_dist.files import flock, writing_to
from gowide_dist.launch.local import default_num_processes, num_gpus
from gowide_dist.launch.profile import load_profile
from gowide_dist.launch.queue import SlurmError, call
from gowide_dist.launch.slurm import check_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GOOD, WARNING, BAD = "good", "warning", "bad"
CHILD_LIMIT_S, COLLECTIVE_LIMIT_S = 180.0, 90.0
CONSTRAINTS = Path(gowide_dist.__file__).parents[1] / "constraints.txt"
INSTALL = "pip install -c constraints.txt -e ."
INSTALL_FFCV = "apt install g++ pkg-config libopencv-dev libturbojpeg0-dev; pip install --force-reinstall ffcv"
SLURM_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "srun")
LOW_DISK_GB, NO_DISK_GB = 10, 1
JPEG_TOLERANCE = 3  # mean difference of two decoders, of 255


class Finding(NamedTuple):
    """The result of a check. mend: the command, or the step, that mends it."""

    check: str
    state: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.check:12} {self.text}" + (f"\n{'':21} {self.mend}" if self.mend else "")


class CheckError(Exception):
    """What a check found wrong: text, what mends it, and how bad it is."""

    def __init__(self, text: str, mend: str, state: str = BAD) -> None:
        super().__init__(text)
        self.mend, self.state = mend, state


def check_machine(runs: Path, cluster: Path | None = None) -> Iterator[Finding]:
    """Yield the finding of each check as soon as it is done. runs: the folder of runs; cluster: a profile to check."""
    yield Finding("python", GOOD, f"{platform.python_version()} in {sys.prefix}")
    yield examine("packages", check_packages)
    yield examine("cpus", check_cpus)
    yield from in_child("ffcv", "jpeg")
    yield from in_child("gpus")
    if cluster:
        yield examine("profile", lambda: check_profile(cluster, runs))
    yield examine("slurm", lambda: check_slurm(is_needed=cluster is not None))
    yield examine("runs", lambda: check_runs(runs))


def examine(name: str, check: Callable[[], str]) -> Finding:
    """The finding of a check, which returns what is good or raises a CheckError."""
    try:
        return Finding(name, GOOD, check())
    except CheckError as fault:
        return Finding(name, fault.state, str(fault), fault.mend)


def in_child(*names: str, limit_s: float = CHILD_LIMIT_S) -> list[Finding]:
    """The findings of some of IN_CHILD, examined by a child process: bad if it crashes or takes more than `limit_s`."""
    command = [sys.executable, "-m", "gowide_dist.insight.doctor", *names]
    # A session of its own: at the limit the child's own children, one per GPU, are killed with it.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, errors = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return [Finding(name, BAD, f"hung: no result within {limit_s:g} s", " ".join(command)) for name in names]
    finally:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    findings = [Finding(*json.loads(line)) for line in output.splitlines() if line.startswith('["')]
    reason = [line.strip() for line in errors.splitlines() if line.strip()][-1:] or [f"status {child.returncode}"]
    failed = [Finding(name, BAD, f"failed: {reason[0]}", IN_CHILD[name][1]) for name in names[len(findings) :]]
    return findings + failed


def check_packages(constraints: Path = CONSTRAINTS) -> str:
    """The dependencies in pyproject.toml are installed, in the versions of constraints.txt if that is present."""
    installed = {canonicalize_name(package.name): package.version for package in metadata.distributions()}
    missing = []
    for requirement in map(Requirement, metadata.requires("gowide_dist") or ()):
        version = installed.get(canonicalize_name(requirement.name))
        is_optional = requirement.marker and not requirement.marker.evaluate({"extra": ""})
        if not is_optional and not (version and requirement.specifier.contains(version, prereleases=True)):
            missing.append(f"{requirement} ({version or 'absent'})")
    if missing:
        raise CheckError(f"missing or too old: {', '.join(missing)}", INSTALL)
    if not constraints.is_file():
        return "all installed; no constraints.txt to compare versions with"
    pins = [line.split("==") for line in constraints.read_text().splitlines() if "==" in line]
    others = [
        f"{name} {version} instead of {pinned}"
        for name, pinned in pins
        if (version := installed.get(canonicalize_name(name))) and version.split("+")[0] != pinned
    ]
    if others:
        raise CheckError(f"other versions than the tested ones: {', '.join(others)}", INSTALL, WARNING)
    return f"all installed, in the versions of {constraints.name}"


def check_cpus() -> str:
    """Cores and memory available to this process, and the processes and threads that `gowide run` starts."""
    cores, processes = len(os.sched_getaffinity(0)), default_num_processes()
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // processes))
    text = (
        f"{cores} of {os.cpu_count()} cores of {cpu_name()}, {available_memory_bytes() / 1e9:.1f} GB of memory free; "
        f"gowide run takes {processes} x {threads} (processes x threads)"
    )
    if processes * threads > cores:
        raise CheckError(f"{text}, more than there are cores", "unset OMP_NUM_THREADS", WARNING)
    return text


def check_ffcv() -> str:
    """Raw images that we encode are read back the same by our loader and by stock FFCV's."""
    import numpy as np
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    with tempfile.TemporaryDirectory(prefix="gowide-doctor-") as scratch:
        sources, beton, pixels = _round_trip(Path(scratch), jpg_share=0.0)
        pipelines = {"image": [SimpleRGBImageDecoder(), ToTensor()]}
        stock = Loader(str(beton), len(sources), num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
        if not (np.array_equal(pixels, sources) and np.array_equal(next(iter(stock))[0].numpy(), sources)):
            raise CheckError("encoded images are not read back the same", INSTALL_FFCV)
    return f"{metadata.version('ffcv')}: images encoded, and read back the same by us and by stock FFCV"


def check_jpeg() -> str:
    """JPEGs decoded by our loader, with FFCV's libturbojpeg, against Pillow's pixels."""
    import numpy as np

    from gowide_dist.data.images import decode_stored, encode_jpg

    with tempfile.TemporaryDirectory(prefix="gowide-doctor-") as scratch:
        sources, _, pixels = _round_trip(Path(scratch), jpg_share=1.0)
    pillow = np.stack([decode_stored(encode_jpg(image, 90)) for image in sources])
    difference = np.abs(pixels.astype(int) - pillow).mean()
    text = f"libturbojpeg's pixels are {difference:.2f} of 255 from Pillow's on average"
    if difference > JPEG_TOLERANCE:
        raise CheckError(text, INSTALL_FFCV)
    return text


def _round_trip(folder: Path, jpg_share: float) -> tuple[NDArray[np.uint8], Path, NDArray[np.uint8]]:
    """Images [8, 32, 32, 3], the FFCV file that they are encoded into, and what our loader reads from that."""
    import numpy as np
    from PIL import Image

    from gowide_dist.data.encode import Options, encode
    from gowide_dist.data.loader import Loader
    from gowide_dist.timeline import Batching

    number, y, x, channel = np.mgrid[:8, :32, :32, :3]
    images = (20 * number + 2 * y + channel * x // 2).astype(np.uint8)  # smooth: chroma subsampling changes it little
    for split in ("train", "val"):
        (folder / split / "class").mkdir(parents=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(folder / split / "class" / f"{index}.png")
    encode("imagefolder", folder / "data", folder, Options(jpg_share, quality=90, workers=1))
    beton = folder / "data" / "val.beton"
    with closing(Loader(beton, Batching(len(images)), train=False, resolution=32)) as loader:
        return images, beton, next(loader.batches()).images.numpy().copy()


def check_gpus() -> str:
    """The GPUs that torch sees, and an all-reduce by NCCL over all of them."""
    import torch

    if not torch.cuda.is_available():
        if num_gpus():
            raise CheckError("there is a driver, but torch sees no GPU", f"nvidia-smi; {INSTALL}")
        return f"no GPU: training uses the CPU, with gloo (torch {torch.__version__})"
    count = torch.cuda.device_count()
    all_reduce("nccl", count)
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return f"{count}: {names}; NCCL {version} sums over all of them"


def all_reduce(backend: str, num_processes: int) -> None:
    """Sum over a group of processes, one per GPU with nccl. Raises ProcessRaisedException where a process fails."""
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory(prefix="gowide-doctor-") as scratch:  # the store deletes its file by itself
        spawn(_all_reduce, (num_processes, backend, Path(scratch) / "store"), nprocs=num_processes)  # type: ignore[no-untyped-call]


def _all_reduce(rank: int, size: int, backend: str, store: Path) -> None:
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{store}", timedelta(seconds=COLLECTIVE_LIMIT_S), size, rank)
    total = torch.tensor([rank + 1], device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(total)
    if total.item() != size * (size + 1) // 2:
        raise ArithmeticError(f"{backend} gives a wrong sum over {size} processes")
    dist.destroy_process_group()


# What mends a check that crashes stands beside it.
IN_CHILD: dict[str, tuple[Callable[[], str], str]] = {
    "ffcv": (check_ffcv, INSTALL_FFCV),
    "jpeg": (check_jpeg, INSTALL_FFCV),
    "gpus": (check_gpus, "NCCL_DEBUG=INFO python -m gowide_dist.insight.doctor gpus, for details"),
}


def check_profile(path: Path, runs: Path) -> str:
    """A cluster profile is valid, its nodes see the folder of runs, and its partition exists where Slurm can tell."""
    try:
        profile = load_profile(path)
        check_folder(runs.absolute(), profile)
    except UserError as error:
        raise CheckError(str(error), f"edit {path}, or choose another --runs") from error
    with suppress(SlurmError):  # which check_slurm reports
        if profile.partition and not call("sinfo", "-h", "-p", profile.partition).strip():
            raise CheckError(f"{path}: no partition '{profile.partition}'", "sinfo -s, for the names of partitions")
    return f"{path}"


def check_slurm(is_needed: bool) -> str:
    """Slurm's commands are installed, and its controller and accounting answer."""
    missing = [name for name in SLURM_COMMANDS if shutil.which(name) is None]
    if len(missing) == len(SLURM_COMMANDS) and not is_needed:
        return "not installed: `gowide run` trains on this machine"
    if missing:
        raise CheckError(f"missing: {', '.join(missing)}", "use a login node, or apt install slurm-client")
    try:
        version = call("sbatch", "--version").strip()
        call("squeue", "--me", "--noheader")
    except SlurmError as error:
        if is_needed:
            raise CheckError(str(error), "scontrol ping; on this machine alone: make devcluster") from error
        text = "installed, but no controller answers; `gowide run` trains on this machine"
        raise CheckError(text, "scontrol ping", WARNING) from error
    try:
        call("sacct", "-X", "-n", "-P", "--format=JobID")
    except SlurmError as error:
        text = f"{version}; the controller answers, accounting does not, so killed jobs are never seen to end ({error})"
        raise CheckError(text, "ask for slurmdbd (AccountingStorageType)", WARNING) from error
    return f"{version}; the controller and accounting answer"


def check_runs(runs: Path) -> str:
    """Files in the folder of runs can be written and locked, and there is space for checkpoints."""
    folder = next(parent for parent in (runs.absolute(), *runs.absolute().parents) if parent.exists())
    try:
        with writing_to(folder, "--runs"), tempfile.NamedTemporaryFile("w", dir=folder) as file:
            flock(file, fcntl.LOCK_EX)
    except (OSError, UserError) as error:
        raise CheckError(str(error), "choose another --runs") from error
    free_gb = shutil.disk_usage(folder).free / 1e9
    text = f"{folder}: files can be written and locked, {free_gb:,.1f} GB are free"
    if free_gb < LOW_DISK_GB:
        raise CheckError(text, f"make room: du -sh {folder}/*", BAD if free_gb < NO_DISK_GB else WARNING)
    return text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(examine(name, IN_CHILD[name][0])), flush=True)  # noqa: T201
