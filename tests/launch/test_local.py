"""torchrun as the launcher starts it: what workers get, and what reaches the user when one fails."""

import os
import platform
import pty
import signal
import subprocess
import sys
import time

import pytest

from gowide_dist.errors import UserError
from gowide_dist.launch.local import KEEP_FREED_MEMORY, WorkerError, leave_error, torchrun

WITHOUT_GPUS = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
LAUNCH = "import sys; from gowide_dist.launch.local import torchrun; torchrun(sys.argv[1], sys.argv[2:], 2)"


def work(task):
    """A worker."""
    rank = int(os.environ["RANK"])
    match task:
        case "describe" if rank == 0:
            print(sys.stdout.isatty(), *(os.environ.get(name) for name in KEEP_FREED_MEMORY), flush=True)
        case "refuse":
            leave_error(f"refused by all {os.environ['WORLD_SIZE']}")
            sys.exit(2)
        case "raise" if rank == 1:
            raise RuntimeError("the worker's own words")
        case "raise":
            time.sleep(60)  # torchrun ends it, which is not what went wrong
        case "die" if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("task", "error", "line"),
    [
        ("refuse", UserError, "refused by all 2"),
        ("raise", WorkerError, "process 1 ended with exit code 1; see its error above"),
        ("die", WorkerError, "process 1 was killed by SIGKILL, mostly for want of memory"),
    ],
)
def test_a_worker_that_fails(task, error, line):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with pytest.raises(error) as caught:
        torchrun(__name__, [task], 2)
    assert str(caught.value).startswith(line)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers


def test_torchrun_itself_prints_nothing():
    command = [sys.executable, "-c", LAUNCH, __name__, "raise"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    workers_own = result.stderr.partition("RuntimeError: the worker's own words\n")
    assert workers_own[0].count("Traceback") == 1
    assert "gowide_dist.launch.local.WorkerError: process 1" in workers_own[2]  # of the launcher, here a script
    assert "torch.distributed" not in result.stderr
    assert result.stdout == ""


def test_workers_see_the_terminal_and_the_settings_of_malloc():
    master, terminal = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", LAUNCH, __name__, "describe"],
        stdout=terminal,
        stderr=terminal,
        env=WITHOUT_GPUS,
        check=True,
    )
    os.close(terminal)
    assert os.read(master, 1000).decode().strip() == f"True {' '.join(KEEP_FREED_MEMORY.values())}"
    os.close(master)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
def test_freed_memory_is_kept():
    """Two blocks of 64 MiB, which malloc by itself takes from the kernel and gives back: 32,768 pages of 4 KiB."""
    script = """
import resource, torch
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(2**24).fill_(1) for _ in range(2)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for name, settings in (("default", {}), ("kept", KEEP_FREED_MEMORY)):
        environment = {**WITHOUT_GPUS, **settings}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        )
        faults[name] = int(done.stdout)
    assert faults["kept"] < 1_000 < 10_000 < faults["default"]


if __name__ == "__main__":
    work(sys.argv[1])
