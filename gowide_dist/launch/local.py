"""torchrun on this machine: one process group for all stages, so that start-up is paid once."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
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
_LAUNCHER_VARIABLE = "GOWIDE_LAUNCHER"  # its process id

_TORCHRUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


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
    """Run `python -m module arguments` in `num_processes` processes that torchrun's agent starts and watches.

    Raises UserError with the line of a worker that raised one, WorkerError if a worker failed otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="gowide-") as scratch:
        error_file = Path(scratch) / "error.json"
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id="gowide",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            signals_to_handle=",".join(_signals_to_handle()),
        )
        try:
            with _for_workers(error_file, num_processes):
                elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            if error_file.exists():
                raise UserError(read_error(error_file) or FULL_DISK) from error
            rank, failure = error.get_first_failure()
            raise WorkerError(f"process {rank} ended with exit code {failure.exitcode}; see its error above") from error
        except SignalException as error:
            raise KeyboardInterrupt from error


def run_here(prepared: Prepared, num_processes: int, *, sequential: bool = False) -> None:
    """Train all unfinished stages under torchrun. sequential: as in `walk`."""
    if left := prepared.unfinished:
        arguments = [
            str(prepared.run.path),
            *(instance.key for instance in left),
            *(["--sequential"] if sequential else []),
        ]
        torchrun("gowide_dist.pipeline", arguments, num_processes)


def _signals_to_handle() -> list[str]:
    """The signals at which torchrun ends the workers: all of its own, but for SIGHUP under nohup, which ignores it."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number.name for number in _TORCHRUN_SIGNALS if not (is_ignored and number == signal.SIGHUP)]


@contextlib.contextmanager
def _for_workers(error_file: Path, num_processes: int) -> Iterator[None]:
    """The environment that torchrun's workers inherit, and torchrun itself silent: the workers have said what is wrong.

    Both end with the workers, or whatever this process starts next would take them over; so does what torchrun does on
    signals, which leaves a traceback.
    """
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in _TORCHRUN_SIGNALS}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ[ERROR_FILE_VARIABLE] = str(error_file)
    os.environ[_LAUNCHER_VARIABLE] = str(os.getpid())
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # not Python's
                signal.signal(number, handler)
        logging.disable(level)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def end_with_launcher() -> None:
    """In a worker, first of all: end when the launcher is killed, or was before; an orphan would go on writing."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's: ours, or one that the user has started
        stop.end_with(int(os.environ.get(_LAUNCHER_VARIABLE, os.getppid())))


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
