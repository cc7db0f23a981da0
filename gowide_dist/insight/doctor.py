"""Checks of this machine, each with what mends it. What may crash or hang runs in a child process with a time limit.

`python -m gowide_dist.insight.doctor CHECK...` is such a child: it prints findings as JSON, one a line. With the
argument `sum` it is a process of `check_gpus`.
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
from contextlib import closing, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.errors import UserError
from gowide_dist.files import flock, writing_to
from gowide_dist.launch.local import default_num_processes, leave, num_gpus, torchrun
from gowide_dist.launch.profile import load_profile
from gowide_dist.launch.queue import SlurmError, call, require
from gowide_dist.launch.slurm import check_folder

GOOD, WARNING, BAD = "good", "warning", "bad"
CHILD_LIMIT_S = 180.0
INSTALL_FFCV = "apt install g++ pkg-config libopencv-dev libturbojpeg0-dev; pip install --force-reinstall ffcv"


class Finding(NamedTuple):
    """The result of a check. mend: the command, or the step, that mends it."""

    check: str
    state: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.check:12} {self.text}" + (f"\n{'':21} {self.mend}" if self.mend else "")


class MinorError(UserError):
    """A fault in spite of which training works."""


def check_machine(runs: Path, cluster: Path | None = None) -> Iterator[Finding]:
    """Yield the finding of each check as soon as it is done. runs: the folder of runs; cluster: a profile to check."""
    yield Finding("python", GOOD, f"{platform.python_version()} in {sys.prefix}")
    yield examine("packages", check_packages, "pip install -c constraints.txt -e .")
    yield examine("cpus", check_cpus, "unset OMP_NUM_THREADS")
    yield from in_child("ffcv", "jpeg")
    yield from in_child("gpus")
    if cluster:
        yield examine("profile", partial(check_profile, cluster, runs), f"edit {cluster}, or choose another --runs")
    yield examine("slurm", partial(check_slurm, is_needed=cluster is not None), "scontrol ping, on a login node")
    yield examine("runs", partial(check_runs, runs), "make room, or choose another --runs")


def examine(name: str, check: Callable[[], str], mend: str) -> Finding:
    """The finding of a check, which returns what is good, or raises a UserError or OSError."""
    try:
        return Finding(name, GOOD, check())
    except (UserError, OSError) as error:
        return Finding(name, WARNING if isinstance(error, MinorError) else BAD, str(error), mend)


def in_child(*names: str, limit_s: float = CHILD_LIMIT_S) -> list[Finding]:
    """The findings of some of IN_CHILD, examined by a child process: bad if it crashes or takes more than `limit_s`."""
    command = [sys.executable, "-m", "gowide_dist.insight.doctor", *names]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:  # torchrun and its workers end with the child
        return [Finding(name, BAD, f"hung: no result within {limit_s:g} s", " ".join(command)) for name in names]
    findings = [Finding(*json.loads(line)) for line in child.stdout.splitlines() if line.startswith('["')]
    reason = (child.stderr.strip() or f"status {child.returncode}").splitlines()[-1]
    failed = [Finding(name, BAD, f"failed: {reason}", IN_CHILD[name][1]) for name in names[len(findings) :]]
    return findings + failed


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


def check_cpus() -> str:
    """Cores and memory available to this process, and the processes and threads that `gowide run` starts."""
    cores, processes = len(os.sched_getaffinity(0)), default_num_processes()
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // processes))
    free_gb = available_memory_bytes() / 1e9
    text = f"{cores} cores, {free_gb:.1f} GB free; gowide run: {processes} processes x {threads} threads"
    if processes * threads > cores:
        raise MinorError(f"{text}, more than there are cores")
    return text


def check_decoding(jpg_share: float, tolerance: float) -> str:
    """Our loader decodes what we encode as Pillow does, up to a mean difference of `tolerance` of 255."""
    import numpy as np

    from gowide_dist.data.encode import Options, write_dataset
    from gowide_dist.data.images import decode_stored, encode_jpg
    from gowide_dist.data.loader import Loader
    from gowide_dist.data.sources import ImageList, SourceDataset
    from gowide_dist.timeline import Batching

    number, y, x, channel = np.mgrid[:8, :32, :32, :3]
    images = (20 * number + 2 * y + channel * x // 2).astype(np.uint8)  # smooth: chroma subsampling changes it little
    pillow = [decode_stored(encode_jpg(image, 90)) for image in images] if jpg_share else images
    dataset = SourceDataset("gradients", ("class",), {"train": ImageList(images, np.zeros(8, np.int64))})
    with tempfile.TemporaryDirectory(prefix="gowide-doctor-") as folder:
        write_dataset(Path(folder), dataset, {}, Options(jpg_share, quality=90, workers=1))
        with closing(Loader(Path(folder) / "train.beton", Batching(8), train=False, resolution=32)) as loader:
            pixels = next(loader.batches()).images.numpy().astype(int)
    difference = np.abs(pixels - pillow).mean()
    kind = "JPEGs" if jpg_share else "raw images"
    text = f"{kind}, encoded and read back: {difference:.2f} of 255 from Pillow's pixels on average"
    if difference > tolerance:
        raise UserError(text)
    return text


def check_gpus() -> str:
    """A sum by NCCL over one process per GPU, started as training starts them."""
    import torch

    count = max(num_gpus(), torch.cuda.device_count())
    if not count:
        return f"no GPU: training uses the CPU, with gloo (torch {torch.__version__})"
    torchrun("gowide_dist.insight.doctor", ["sum"], count)
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    return f"{count}: {names}{'; NCCL sums over all of them' if count > 1 else ''}"


def sum_over_processes() -> None:
    """In every process of torchrun: raises UserError if the processes cannot add their ranks on their devices."""
    import torch

    from gowide_dist import world as worlds

    try:
        with worlds.join() as world:
            total = int(world.sum(torch.tensor([world.rank + 1], device=world.device)))
    except RuntimeError as error:  # CUDA's and NCCL's
        raise UserError(f"{error}") from error
    if total != world.size * (world.size + 1) // 2:
        raise UserError(f"the sum over {world.size} processes is wrong")


# Beside each check what mends it. 3 of 255: libturbojpeg rounds otherwise than Pillow's decoder.
IN_CHILD: dict[str, tuple[Callable[[], str], str]] = {
    "ffcv": (partial(check_decoding, jpg_share=0.0, tolerance=0.0), INSTALL_FFCV),
    "jpeg": (partial(check_decoding, jpg_share=1.0, tolerance=3.0), INSTALL_FFCV),
    "gpus": (check_gpus, "nvidia-smi; NCCL_DEBUG=INFO python -m gowide_dist.insight.doctor gpus, for details"),
}


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
        if is_needed:
            raise
        raise MinorError(f"{error}; `gowide run` trains on this machine") from error
    try:
        call("sacct", "-X", "-n", "-P", "--format=JobID")
    except SlurmError as error:
        text = "accounting does not answer, so killed jobs are never seen to end; ask for slurmdbd"
        raise MinorError(f"{version}: {text} ({error})") from error
    return f"{version}; the controller and accounting answer"


def check_runs(runs: Path) -> str:
    """Files in the folder of runs can be written and locked, and there is space for checkpoints."""
    folder = next(parent for parent in (runs.absolute(), *runs.absolute().parents) if parent.exists())
    with writing_to(folder, "--runs"), tempfile.NamedTemporaryFile("w", dir=folder) as file:
        flock(file, fcntl.LOCK_EX)
    free_gb = shutil.disk_usage(folder).free / 1e9
    text = f"{folder}: files can be written and locked, {free_gb:,.1f} GB are free"
    if free_gb < 10:
        raise (UserError if free_gb < 1 else MinorError)(text)
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["sum"]:
        from gowide_dist.pipeline import work

        leave(work(sum_over_processes, Path.cwd()))
    for name in sys.argv[1:]:
        print(json.dumps(examine(name, *IN_CHILD[name])), flush=True)  # noqa: T201
