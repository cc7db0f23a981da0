"""`backend.py` in processes of its own: conversions, and runtimes that answer images with logits."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gowide_dist.errors import UserError
from gowide_dist.launch.local import explain

_SCRIPT = Path(__file__).with_name("backend.py")
_MISSING = """
import json
import sys
from importlib import metadata
missing = []
for name in sys.argv[1:]:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        missing.append(name)
print(json.dumps(missing))
"""
Forward = Callable[[Tensor], Tensor]  # images, uint8 [B, H, H, 3] -> logits, float32 [B, K]


class BackendError(Exception):
    """A conversion or a runtime failed; the message says why, in a line."""


@cache
def missing_packages(python: Path, packages: tuple[str, ...]) -> list[str]:
    """Those of the packages, by their names in pip, that a Python does not have. Raises UserError if it is none."""
    try:
        command = [*_command(python), "-c", _MISSING, *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
        missing: list[str] = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:  # ValueError: it ignores what it is told
        raise UserError(f"--converter: {python} is no Python that runs; give an environment's bin/python") from error
    return missing


def convert(python: Path, job: Mapping[str, Any]) -> None:
    """Write a file as `job` says. Raises BackendError if that fails."""
    with _started(python, job) as (process, log):
        assert process.stdout is not None
        process.stdout.read()  # until it ends; its stdin stays open, whose end would end it
        if process.wait():
            raise BackendError(_cause(process, log))
    if not Path(job["target"]).is_file():
        raise BackendError(f"{python} ended without writing it")


@contextmanager
def running(python: Path, job: Mapping[str, Any], num_classes: int) -> Iterator[tuple[dict[str, Any], Forward]]:
    """A file open in its runtime: what this says of itself, its versions and latency, and the file as a function.

    Raises BackendError if the file cannot be opened; the function does, if it cannot be computed.
    """
    with _started(python, job) as (process, log):
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def answer(size: int | None) -> bytes:
            """Bytes of the process's stdout: so many, or a line."""
            values = stdout.readline() if size is None else stdout.read(size)
            if not values or len(values) < (size or 0):
                raise BackendError(_cause(process, log))
            return values

        def forward(images: Tensor) -> Tensor:
            with suppress(BrokenPipeError):  # it has failed; `answer` says so
                stdin.write(struct.pack("<q", len(images)) + images.numpy().tobytes())
                stdin.flush()
            values = bytearray(answer(4 * len(images) * num_classes))
            return torch.frombuffer(values, dtype=torch.float32).view(len(images), num_classes)

        yield json.loads(answer(None)), forward


@contextmanager
def _started(python: Path, job: Mapping[str, Any]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """The process that does a job, until the context ends, and what it writes on stderr."""
    command = [*_command(python), str(_SCRIPT), json.dumps(job)]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=_environment(), process_group=0)
        try:
            yield process, log
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started, as a script around a Python does
            raise
        finally:
            with suppress(BrokenPipeError):
                process.communicate()  # the end of its stdin ends it


def _command(python: Path) -> list[str]:
    """Another Python sees its own packages alone; this one as this process does, but nothing beside the script."""
    return [str(python), "-P" if python == Path(sys.executable) else "-I"]


def _environment() -> dict[str, str]:
    """Runtimes are tried on the CPU, on as many threads as PyTorch has."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _cause(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    """Why a process has ended: the last line that it wrote, or the signal that killed it."""
    if process.wait() < 0:
        return f"its process {explain(process.returncode)}"
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), explain(process.returncode))
