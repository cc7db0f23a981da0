"""torchrun as the launcher starts it: what workers get, and what reaches the user when one fails."""

import os
import platform
import pty
import signal
import subprocess
import sys
import time

import pytest
import torch

from gowide_dist import load_recipe, world
from gowide_dist.errors import RecipeError, UserError
from gowide_dist.launch import local
from gowide_dist.launch.local import KEEP_FREED_MEMORY, WorkerError, choose_num_processes, leave_error, torchrun
from tests.command import GOWIDE
from tests.fashion import chain, encode_part, write_job

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
        ("die", WorkerError, "process 1 was killed by SIGKILL, usually out of memory"),
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


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(write_job(tmp_path, chain(tmp_path)))  # batch_size: 60


@pytest.mark.parametrize(("default", "chosen"), [(1, 1), (2, 2), (6, 6), (7, 6), (8, 6), (64, 60)])
def test_a_number_of_processes_that_was_not_asked_for_divides_the_batch(recipe, monkeypatch, capsys, default, chosen):
    monkeypatch.setattr(local, "default_num_processes", lambda: default)
    assert choose_num_processes(recipe, None) == chosen
    fault = f"using {chosen} processes instead of {default}: batch_size: 60 is not divisible by {default} processes\n"
    assert capsys.readouterr().err == (fault if default != chosen else "")


@pytest.mark.parametrize(
    ("overrides", "default", "chosen", "fault"),
    [
        (["batch_size=256"], 3, 2, "batch_size: 256 is not divisible by 3 processes"),
        (["batch_size=61"], 4, 1, "batch_size: 61 is not divisible by 4 processes"),
        (["stages.teacher.optim.accumulate=4"], 2, 1, "stages.teacher.optim.accumulate: the local batch of 30 images"),
        (["stages.teacher.mixup=1"], 4, 3, "stages.teacher: mixup mixes pairs of images, but the local batch of 15"),
    ],
)
def test_whatever_keeps_them_from_sharing_the_batch(
    recipe, tmp_path, monkeypatch, capsys, overrides, default, chosen, fault
):
    recipe = load_recipe(tmp_path / f"{recipe.name}.yaml", overrides)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(default))))
    assert choose_num_processes(recipe, None) == chosen
    assert capsys.readouterr().err.startswith(f"using {chosen} of {default} GPUs: {fault}")
    with pytest.raises(RecipeError, match=rf"^{fault}.*; --nproc {chosen} would do$"):
        choose_num_processes(recipe, default)


def test_a_batch_that_not_even_one_process_can_take(recipe, tmp_path, monkeypatch):
    recipe = load_recipe(tmp_path / f"{recipe.name}.yaml", ["stages.teacher.optim.accumulate=7"])
    monkeypatch.setattr(local, "default_num_processes", lambda: 3)
    for asked in (None, 2, 1):
        with pytest.raises(RecipeError, match=r"images is not divisible by 7$"):
            choose_num_processes(recipe, asked)


def test_no_more_processes_than_validation_images(tmp_path, monkeypatch, capsys):
    recipe = load_recipe(write_job(tmp_path, chain(encode_part(tmp_path, 60, 2))))
    monkeypatch.setattr(local, "default_num_processes", lambda: 4)
    assert choose_num_processes(recipe, None) == 2
    assert "using 2 processes instead of 4: data.val: " in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"has 2 images for 3 processes; take at most 2; --nproc 2 would do"):
        choose_num_processes(recipe, 3)


def test_a_number_of_processes_that_was_asked_for_is_taken_or_refused(recipe, monkeypatch):
    assert choose_num_processes(recipe, 4) == 4
    with pytest.raises(RecipeError, match="batch_size: 60 is not divisible by 7 processes"):
        choose_num_processes(recipe, 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert choose_num_processes(recipe, 2) == 2
    with pytest.raises(UserError, match="--nproc 4: there is one process per GPU, and this machine has 2"):
        choose_num_processes(recipe, 4)


def test_launcher_and_workers_call_the_expected_gpus_the_same():
    assert local.GPUS_VARIABLE == world.GPUS_VARIABLE


class Cuda:
    """Stands in for torch.cuda: a machine with some GPUs."""

    def __init__(self, monkeypatch, count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    Cuda(monkeypatch, 4)
    assert [world.choose_device(rank).index for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"more processes than GPUs \(4\)"):
        world.choose_device(4)
    Cuda(monkeypatch, 1)  # a Slurm task that sees its own GPU alone
    assert world.choose_device(3).index == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # two processes of one torchrun, on one GPU
    assert world.choose_device(0).index == 0
    with pytest.raises(UserError, match=r"more processes than GPUs \(1\)"):
        world.choose_device(1)


def test_gpus_that_are_expected_and_not_seen_stop_the_run(monkeypatch):
    Cuda(monkeypatch, 0)
    monkeypatch.delenv(world.GPUS_VARIABLE, raising=False)
    assert world.choose_device(0).type == "cpu"
    monkeypatch.setenv(world.GPUS_VARIABLE, "8")
    with pytest.raises(UserError, match=r"8 GPUs are expected on this node, but PyTorch .* sees none"):
        world.choose_device(0)


def test_a_run_never_falls_back_to_the_cpu_where_there_are_gpus(tmp_path):
    """nvidia-smi lists a GPU that PyTorch cannot use: its driver is too old."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: Old (UUID: GPU-0)'\n")
    smi.chmod(0o755)
    job = write_job(tmp_path, chain(encode_part(tmp_path, 240, 100)))
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PATH"] = f"{smi.parent}:{environment['PATH']}"
    command = [GOWIDE, "run", job, "--runs", tmp_path / "runs"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("gowide: 1 GPUs are expected on this node")
    assert result.stderr.count("\n") == 1
    hidden = {**environment, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*command, "--only", "teacher"], capture_output=True, text=True, env=hidden, check=False)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    work(sys.argv[1])
