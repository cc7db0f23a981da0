"""torchrun on this machine: one process group for all stages, so that start-up is paid once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from gowide_dist import stop
from gowide_dist.errors import FULL_DISK, InternalError, UserError
from gowide_dist.prepare import Prepared

ERROR_FILE_VARIABLE = "GOWIDE_ERROR_FILE"  # where a worker leaves the error that the launcher shows
LAUNCHER_VARIABLE = "GOWIDE_LAUNCHER"  # process id of the parent, with which a process ends
# Read by glibc's malloc: keep what is freed for the next training step, which wants the same again. Else large blocks
# return to the kernel, which clears every page anew: up to a fifth of a step on CPUs.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WorkerError(InternalError):
    """A worker process ended in a way that the user cannot mend; it has said why."""


def default_num_processes() -> int:
    """One process per GPU; without GPUs one per two cores, each with two threads."""
    if gpus := num_gpus():
        return gpus
    return max(1, len(os.sched_getaffinity(0)) // 2)


def num_gpus() -> int:
    """GPUs of this machine, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len(
            [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device.strip() not in ("", "-1")]
        )
    return _installed_gpus()


@functools.cache
def _installed_gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def torchrun(module: str, arguments: list[str], num_processes: int) -> None:
    """Run `python -m module arguments` in `num_processes` processes under torchrun.

    SIGINT, SIGTERM and SIGHUP go on to the workers, which save and end; then KeyboardInterrupt is raised.
    Raises UserError with the line of a worker that raised one, WorkerError if a worker failed otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="gowide-") as folder:
        error_file = Path(folder) / "error.json"
        torchrun = subprocess.Popen(
            [
                *(sys.executable, "-m", "gowide_dist.launch.torchrun"),
                *("--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={num_processes}"),
                *("--monitor-interval=0.1", "-m", module, *arguments),
            ],
            env=_environment(error_file, num_processes),
            start_new_session=True,  # or it would get a terminal's Ctrl-C twice, and not wait for the workers
        )
        with _forwarding_signals_to(torchrun):
            status = torchrun.wait()
        message = read_error(error_file)
    if status == 2:
        raise UserError(message or FULL_DISK)
    if status > 128:
        raise KeyboardInterrupt
    if status:
        raise WorkerError(message or f"torchrun ended with exit status {status}")


def run_here(prepared: Prepared, num_processes: int, *, sequential: bool = False) -> None:
    """Train all unfinished stages under torchrun. sequential: as in `walk`."""
    if left := prepared.unfinished:
        arguments = [
            str(prepared.run.path),
            *(instance.key for instance in left),
            *(["--sequential"] if sequential else []),
        ]
        torchrun("gowide_dist.pipeline", arguments, num_processes)


def _environment(error_file: Path, num_processes: int) -> dict[str, str]:
    """The environment of torchrun and its workers; what the user has set holds."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_processes)),
        "GLOO_SOCKET_IFNAME": "lo",
        **({} if num_gpus() else KEEP_FREED_MEMORY),
    }
    return {**defaults, **os.environ, ERROR_FILE_VARIABLE: str(error_file), LAUNCHER_VARIABLE: str(os.getpid())}


@contextlib.contextmanager
def _forwarding_signals_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals that this process ignores, as SIGHUP under nohup, stay ignored."""
    numbers = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_with_launcher() -> None:
    """In a worker, first of all: end when the launcher is killed, or was before; an orphan would go on writing."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's: ours, or one that the user has started
        stop.end_with(int(os.environ.get(LAUNCHER_VARIABLE, os.getppid())))


def leave(status: int) -> NoReturn:
    """End a worker that is through without winding Python up: gloo's threads outlive their group and may abort that."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def read_error(path: Path) -> str | None:
    """The line in an error file, if there is one. On a full disk it is empty."""
    try:
        line: str = json.loads(path.read_text())["message"]
    except (FileNotFoundError, ValueError):
        return None
    return line


def leave_error(message: str) -> None:
    """In a worker: say what went wrong, to the launcher if there is one, else to the user."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path is None:
        sys.stderr.write(f"{message}\n")
    elif not Path(path).exists():
        with contextlib.suppress(OSError):  # on a full disk the exit status alone says it
            Path(path).write_text(json.dumps({"message": message}))
