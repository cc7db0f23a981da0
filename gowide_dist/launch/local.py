"""torchrun on this machine, one process group for all stages; and how a worker ends and tells what went wrong."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gowide_dist import stop
from gowide_dist.errors import FULL_DISK, InternalError, RecipeError, UserError
from gowide_dist.machine import num_cores
from gowide_dist.prepare import check_share
from gowide_dist.progress import say
from gowide_dist.recipe import Recipe

ERROR_FILE_VARIABLE = "GOWIDE_ERROR_FILE"  # where a worker writes the error that the launcher shows
LAUNCHER_VARIABLE = "GOWIDE_LAUNCHER"  # id of the parent process, whose end is the worker's end
GPUS_VARIABLE = "GOWIDE_GPUS_PER_NODE"  # `world` refuses to train on the CPU where this is set
# glibc's malloc reads these: keep freed memory for the next training step, which allocates the same again. By default
# large blocks go back to the kernel, which clears every page anew: up to a fifth of a step on CPUs.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0"}

SAVE_WITHIN_S = 120  # after a request to stop: a large state on a slow file system takes a while
SAY_AFTER_S = 5  # of waiting for them to save
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, stop.WARNING_SIGNAL)
_MEANINGS: dict[int, str] = {
    **dict.fromkeys(STOP_SIGNALS, ", before it could save anything: run the same command again"),
    signal.SIGKILL: (
        ", usually out of memory (see dmesg, or the container's limit): `gowide plan` estimates what a process "
        "needs; fewer processes, or stages.STAGE.optim.accumulate, take less"
    ),
    signal.SIGBUS: (
        ", usually because shared memory or a disk is full (see df -h, /dev/shm included), or because a data file was "
        "cut short while it was read"
    ),
    signal.SIGILL: ", usually because the CPU is older than what PyTorch or FFCV was built for: see `gowide doctor`",
    signal.SIGSEGV: ", a crash in compiled code: see `gowide doctor`; PYTHONFAULTHANDLER=1 shows where",
    signal.SIGABRT: (
        ", usually because it waited for another process longer than the collective timeout "
        "(GOWIDE_COLLECTIVE_TIMEOUT_S): see the errors above"
    ),
}


class WorkerError(InternalError):
    """A worker failed in a way that the user cannot fix, and has printed why."""


def default_num_processes() -> int:
    """One process per GPU; without GPUs one per two cores, each with two threads."""
    return num_gpus() or max(1, num_cores() // 2)


def choose_num_processes(recipe: Recipe, asked: int | None) -> int:
    """As many as asked for, else the default, or as many fewer as can share the recipe's images, which is then said.

    Raises RecipeError if those asked for cannot share them, UserError if they are more than the GPUs.
    """
    most = default_num_processes() if asked is None else asked
    if asked and 0 < num_gpus() < asked:
        raise UserError(
            f"--nproc {asked}: there is one process per GPU, and this machine has {num_gpus()}; leave --nproc out, or "
            "set CUDA_VISIBLE_DEVICES to nothing to train on the CPU"
        )
    fault = ""
    for number in range(most, 0, -1):
        try:
            check_share(recipe, number)
        except RecipeError as error:
            fault = fault or str(error)
            continue
        if fault and asked:
            raise RecipeError(f"{fault}; --nproc {number} would do")
        if fault:
            which = f"{number} of {most} GPUs" if num_gpus() else f"{number} processes instead of {most}"
            say(f"using {which}: {fault.partition(';')[0]}")
        return number
    raise RecipeError(fault)


def num_gpus() -> int:
    """GPUs of this machine, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        devices = [device.strip() for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return len(list(itertools.takewhile(lambda device: device not in ("", "-1", "NoDevFiles"), devices)))
    return _installed_gpus()


@functools.cache
def _installed_gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
        says, is_broken = f"{listed.stdout} {listed.stderr}".strip(), listed.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        says, is_broken = str(error), True
    if is_broken and "no devices" not in says.lower():
        raise UserError(
            f"nvidia-smi fails ({says[:200]}): there may be GPUs that cannot be used; repair the driver, or set "
            "CUDA_VISIBLE_DEVICES to nothing to train on the CPU"
        )
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def torchrun(module: str, arguments: list[str], num_processes: int) -> None:
    """Run `python -m module arguments` in `num_processes` processes under torchrun.

    Forwards STOP_SIGNALS, on which the workers save and end, and then raises KeyboardInterrupt. Raises UserError with
    the line of a worker that raised one, WorkerError if a worker failed otherwise.
    """
    # As --standalone, which asks for the address of "localhost": some containers have none, and it waits for minutes.
    options = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={uuid.uuid4()}", "--nnodes=1"]
    options += ["--local-addr=127.0.0.1", f"--nproc-per-node={num_processes}"]
    options += ["--monitor-interval=0.1"]  # seconds: a failed worker ends the others at once
    options += [f"--shutdown-timeout={SAVE_WITHIN_S}"]
    defaults = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // num_processes)),
        "GLOO_SOCKET_IFNAME": "lo",
        **device_environment(num_gpus()),
    }
    with tempfile.TemporaryDirectory(prefix="gowide-") as folder:
        error_file = Path(folder) / "error.json"
        options.append(f"--log-dir={folder}")
        own = {ERROR_FILE_VARIABLE: str(error_file), LAUNCHER_VARIABLE: str(os.getpid())}
        process = subprocess.Popen(
            [sys.executable, "-m", "gowide_dist.launch.torchrun", *options, "-m", module, *arguments],
            # Variables that the user has set stay as they are, but for torchrun's, which another job has left.
            env={**defaults, **{k: v for k, v in os.environ.items() if not k.startswith("PET_")}, **own},
            # A terminal's Ctrl-C reaches this process alone, which forwards it: a second one makes torchrun give up
            # waiting for the workers.
            start_new_session=True,
        )
        with _forwarding_signals_to(process) as forwarded:
            status = _wait(process, forwarded)
        message = read_error(error_file)
    if status == 2:
        raise UserError(message or FULL_DISK)
    if status > 128 or (status and forwarded and not message):
        raise KeyboardInterrupt
    if status:
        raise WorkerError(message or f"torchrun {explain(status)}")


def device_environment(num_gpus: int) -> dict[str, str]:
    """Variables for the processes of a node with `num_gpus` GPUs."""
    return {GPUS_VARIABLE: str(num_gpus)} if num_gpus else KEEP_FREED_MEMORY


@contextlib.contextmanager
def _forwarding_signals_to(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Inside, the first signal goes to `process`, and the list names it.

    At a second one torchrun would give up waiting for its workers, which are saving; later ones come to nothing too,
    for the command is about to end. Signals that this process ignores, such as SIGHUP under nohup, stay ignored.
    """
    forwarded: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if not forwarded:
            # Not SIGINT: a worker whose interpreter is still starting would print a traceback.
            process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
        forwarded.append(number)

    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield forwarded
    finally:
        if not forwarded:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes], forwarded: list[int]) -> int:
    """The exit status of `process`. Says so if it is long in ending after a forwarded signal."""
    told_at: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1)
        if forwarded and told_at is None:
            told_at = time.monotonic()
        elif told_at and time.monotonic() > told_at + SAY_AFTER_S:
            say(f"waiting for the processes to save, {SAVE_WITHIN_S} s at most; SIGQUIT (Ctrl-\\) ends them at once")
            told_at = float("inf")


def explain(exitcode: int) -> str:
    """What became of a process, what that mostly means and what to do."""
    if exitcode >= 0:
        return f"ended with exit code {exitcode}; see its error above"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:  # a real-time signal
        name = f"signal {-exitcode}"
    return f"was killed by {name}{_MEANINGS.get(-exitcode, '')}"


def end_with_launcher() -> None:
    """Called first in a worker: it ends with torchrun, even if killed. An orphan would go on writing into the run."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # under torchrun: ours, or one that the user has started
        stop.end_with(int(os.environ.get(LAUNCHER_VARIABLE, os.getppid())))


def leave(status: int) -> NoReturn:
    """End a worker by os._exit, without interpreter shutdown, which gloo's or NCCL's threads may abort or hold up."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk, a closed pipe
            stream.flush()
    os._exit(status)


def read_error(path: Path) -> str | None:
    """The line in an error file; None if there is no file, or an empty one, as on a full disk."""
    try:
        return str(json.loads(path.read_text())["message"])
    except (FileNotFoundError, ValueError):
        return None


def leave_error(message: str) -> None:
    """In a worker: write the line to the launcher's error file, unless another worker was first; else to stderr."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path is None:
        sys.stderr.write(f"{message}\n")
    elif not Path(path).exists():
        with contextlib.suppress(OSError):  # full disk: the launcher sees the exit status
            Path(path).write_text(json.dumps({"message": message}))
