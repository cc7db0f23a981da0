"""Checks of this machine, each with what fixes it.

Checks that may crash or hang run under torchrun, as training does: `python -m gowide_dist.insight.doctor CHECK`.
"""

from __future__ import annotations

import faulthandler
import fcntl
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stderr, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.errors import InternalError, UserError
from gowide_dist.files import flock, writing_to
from gowide_dist.launch.local import default_num_processes, leave, num_gpus, torchrun
from gowide_dist.launch.profile import load_profile
from gowide_dist.launch.queue import SlurmError, call, require
from gowide_dist.launch.slurm import check_folder
from gowide_dist.machine import num_cores

GOOD, WARNING, BAD = "good", "warning", "bad"
LIMIT_S = 180.0  # of a process that may hang
SLOW_IMPORT_S = 15.0  # 2 to 4 from a local disk
INSTALL_FFCV = "apt install g++ pkg-config libopencv-dev libturbojpeg0-dev; pip install --force-reinstall ffcv"


class Finding(NamedTuple):
    """The result of a check. fix: the command or the step that fixes it."""

    check: str
    state: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.check:12} {self.text}" + (f"\n{'':21} {self.fix}" if self.fix else "")


class MinorError(UserError):
    """A problem with which training still works."""


def check_machine(runs: Path, cluster: Path | None = None) -> Iterator[Finding]:
    """Yield the finding of each check as soon as it is done. runs: the folder of runs; cluster: a profile to check."""
    yield Finding("python", GOOD, f"{platform.python_version()} in {sys.prefix}")
    packages = examine("packages", check_packages, "pip install -c constraints.txt . (to submit: slurm/container)")
    yield packages
    yield examine("cpus", check_cpus, "unset OMP_NUM_THREADS")
    if packages.state == GOOD:  # a login node can do without them
        yield examine("import", check_import, "install on a local disk, or into one file: slurm/container")
        yield examine("opencv", check_opencv, "apt install libgl1 libglib2.0-0")
        yield examine("cache", check_cache, "export NUMBA_CACHE_DIR=FOLDER, which can be written, on nodes too")
        yield examine("ffcv", partial(check_images, "raw"), INSTALL_FFCV)
        yield examine("jpeg", partial(check_images, "JPEG"), INSTALL_FFCV)
        yield examine("gpus", check_gpus, "nvidia-smi; NCCL_DEBUG=INFO gowide doctor, for details")
    if cluster:
        yield examine("profile", partial(check_profile, cluster, runs), f"edit {cluster}, or choose another --runs")
    yield examine("slurm", partial(check_slurm, is_needed=cluster is not None), "scontrol ping, on a login node")
    yield examine("runs", partial(check_runs, runs), "free disk space, or choose another --runs")


def examine(name: str, check: Callable[[], str], fix: str) -> Finding:
    """The finding of a check, which returns what is good or raises what is wrong."""
    try:
        return Finding(name, GOOD, check())
    except (UserError, InternalError, OSError) as error:
        return Finding(name, WARNING if isinstance(error, MinorError) else BAD, str(error), fix)


def check_packages() -> str:
    """The packages that gowide_dist's metadata requires are installed, in versions that it allows."""
    missing = []
    for requirement in map(Requirement, metadata.requires("gowide_dist") or ()):
        version = next((found.version for found in metadata.distributions(name=requirement.name)), None)
        is_optional = requirement.marker and not requirement.marker.evaluate({"extra": ""})
        if not is_optional and not (version and requirement.specifier.contains(version, prereleases=True)):
            missing.append(f"{requirement} ({version or 'absent'})")
    if missing:
        raise UserError(f"missing or too old: {', '.join(missing)}")
    return "all installed, in versions that gowide_dist allows"


def check_import() -> str:
    """A new process imports PyTorch quickly: each of training's does so, from thousands of small files."""
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__path__[0])"], capture_output=True, text=True
    )
    seconds = time.monotonic() - started
    if result.returncode:
        raise UserError(f"`import torch` fails: {(result.stderr.strip().splitlines() or ['killed'])[-1]}")
    folder = Path(result.stdout.strip())
    text = f"torch is imported in {seconds:.1f} s from {folder} ({filesystem(folder)})"
    if seconds > SLOW_IMPORT_S:
        raise MinorError(f"{text}; every process of a training waits so long")
    return text


def filesystem(path: Path) -> str:
    """The type of the file system that holds `path`, in the words of stat(1): nfs, lustre, ext2/ext3 ..."""
    command = ["stat", "--file-system", "--format=%T", str(path)]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown file system"


def check_opencv() -> str:
    """OpenCV's package finds the system's libraries that it brings no copies of."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(str(error)) from None
    return f"{cv2.__version__} is loaded"


def check_cpus() -> str:
    """Cores and memory available to this process, and the processes and threads that `gowide run` starts."""
    cores, processes = num_cores(), default_num_processes()
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // processes))
    free_gb = available_memory_bytes() / 1e9
    text = f"{cores} cores, {free_gb:.1f} GB free; gowide run: {processes} processes x {threads} threads"
    if processes * threads > cores:
        raise MinorError(f"{text}, more than there are cores")
    return text


def check_cache() -> str:
    """The code that numba compiles can be kept for the next process."""
    from gowide_dist.data.kernels import cache_folder

    if folder := cache_folder():
        return f"compiled code is kept in {folder}"
    raise MinorError(
        "compiled code cannot be kept, for neither the package's folder nor the home can be written: every process "
        "compiles for some seconds"
    )


def check_images(kind: str) -> str:
    """Images that we encode, raw or as JPEG, are read back as Pillow reads them."""
    torchrun("gowide_dist.insight.doctor", [kind], 1)
    return f"{kind} images are encoded, and read back as Pillow reads them"


def compare_with_pillow(kind: str) -> None:
    """Raises UserError if our loader does not decode as Pillow does what we encode."""
    import numpy as np
    from PIL import Image

    from gowide_dist.data.encode import Options, write_dataset
    from gowide_dist.data.images import encode_jpg
    from gowide_dist.data.loader import Loader
    from gowide_dist.data.sources import ImageList, SourceDataset
    from gowide_dist.timeline import Batching

    is_jpeg = kind == "JPEG"
    number, y, x, channel = np.mgrid[:8, :32, :32, :3]
    images = (20 * number + 2 * y + channel * x // 2).astype(np.uint8)  # smooth: chroma subsampling changes it little
    pillow = (
        [np.asarray(Image.open(io.BytesIO(encode_jpg(image, 90).data))) for image in images] if is_jpeg else [*images]
    )
    dataset = SourceDataset("gradients", ("class",), {"train": ImageList(images, np.zeros(8, np.int64))})
    with tempfile.TemporaryDirectory(prefix="gowide-doctor-") as folder, redirect_stderr(io.StringIO()):
        write_dataset(Path(folder), dataset, {}, Options(float(is_jpeg), quality=90, workers=1))
        with closing(Loader(Path(folder) / "train.beton", Batching(8), train=False, resolution=32)) as loader:
            pixels = next(loader.batches()).images.numpy().astype(int)
    difference = np.abs(pixels - np.stack(pillow)).mean()
    if difference > (3 if is_jpeg else 0):  # libturbojpeg rounds otherwise than Pillow's decoder
        raise UserError(f"{kind} images are read back {difference:.2f} of 255 from Pillow's pixels on average")


def check_gpus() -> str:
    """A sum by NCCL over one process per GPU, started as training starts them."""
    if not (count := num_gpus()):
        return "none: training uses the CPU, with gloo"
    torchrun("gowide_dist.insight.doctor", ["sum"], count)
    return f"{count}, a process on each{', and NCCL sums over all of them' if count > 1 else ''}"


def sum_over_processes() -> None:
    """In every process of torchrun: raises UserError if the processes cannot add their ranks on their devices."""
    import torch

    from gowide_dist import world as worlds

    with worlds.join() as world:
        total = int(world.sum(torch.tensor([world.rank + 1], device=world.device)))
    if total != world.size * (world.size + 1) // 2:
        raise UserError(f"the sum over {world.size} processes is wrong")


def check_profile(path: Path, runs: Path) -> str:
    """A cluster profile is valid, its nodes see the folder of runs, and its partition exists where Slurm can tell."""
    profile = load_profile(path)
    check_folder(runs.absolute(), profile)
    with suppress(SlurmError):  # which check_slurm reports
        if profile.partition and not call("sinfo", "-h", "-p", profile.partition).strip():
            raise UserError(f"{path}: no partition '{profile.partition}'; `sinfo -s` lists them")
    return f"{path}"


def check_slurm(is_needed: bool) -> str:
    """Slurm's commands are installed, and its controller and accounting answer."""
    if not (is_needed or shutil.which("sbatch")):
        return "not installed: `gowide run` trains on this machine"
    for command in ("sbatch", "squeue", "scancel", "scontrol", "sacct", "srun"):
        require(command)
    try:
        version = call("sbatch", "--version").strip()
        call("squeue", "--me", "--noheader")
    except SlurmError as error:
        raise (UserError if is_needed else MinorError)(f"{error}") from error
    try:
        call("sacct", "-X", "-n", "-P", "--format=JobID")
    except SlurmError as error:
        text = (
            "accounting does not answer, so `gowide status` cannot tell that a killed job has ended; ask for slurmdbd"
        )
        raise MinorError(f"{version}: {text} ({error})") from error
    return f"{version}; the controller and accounting answer"


def check_runs(runs: Path) -> str:
    """Files in the folder of runs can be written and locked, and there is space for checkpoints."""
    folder = next(parent for parent in (runs.absolute(), *runs.absolute().parents) if parent.exists())
    with writing_to(folder, "--runs"), tempfile.NamedTemporaryFile("w", dir=folder) as file:
        flock(file, fcntl.LOCK_EX)
    free_gb = shutil.disk_usage(folder).free / 1e9
    text = f"{folder} ({filesystem(folder)}): files can be written and locked, {free_gb:,.1f} GB are free"
    if free_gb < 10:
        raise (UserError if free_gb < 1 else MinorError)(text)
    return text


def main() -> int:
    """Entry of a process that may crash or hang; it then prints a traceback."""
    from gowide_dist.pipeline import work

    faulthandler.enable()
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    check = sys.argv[1]
    return work(sum_over_processes if check == "sum" else partial(compare_with_pillow, check), Path.cwd())


if __name__ == "__main__":
    leave(main())
