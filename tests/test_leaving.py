"""How `gowide run` ends where its surroundings fail: one line, the right status, nothing lost."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gowide_dist.errors import UserError
from gowide_dist.launch import local
from gowide_dist.launch.local import torchrun
from gowide_dist.run import Run, read_metrics
from tests.command import GOWIDE, HEARING, LIMIT_S, gowide
from tests.fashion import chain, encode_part, write_job


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return encode_part(tmp_path_factory.mktemp("fashion"), 240, 100)


@pytest.fixture
def job(data, tmp_path):
    return write_job(tmp_path, chain(data))


@pytest.fixture
def command(job, tmp_path):
    return ["run", str(job), "--runs", str(tmp_path / "runs"), "--nproc", "2", "--only", "teacher", "log_every_steps=1"]


@pytest.fixture
def place(tmp_path):
    return Run(tmp_path / "runs" / "chain").stage("teacher/wide")


@pytest.fixture
def start():
    """Start the command in a session of its own; it has ended when the test has."""
    processes = []

    def started(command):
        process = subprocess.Popen(
            [*HEARING, GOWIDE, *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(moment, process):
    deadline = time.monotonic() + LIMIT_S
    while not moment():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def descendants(pid):
    """Ids of the processes below one, and their command lines."""
    children = [int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()]
    found = {child: Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ") for child in children}
    for child in children:
        found |= descendants(child)
    return found


def test_ctrl_c_before_anything_has_begun(start, command, place):
    process = start(command)
    wait_for(lambda: any("launch.torchrun" in line for line in descendants(process.pid).values()), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert place.done is None


def test_a_signal_to_one_worker_ends_all_and_saves(start, command, place):
    process = start([*command, "stages.teacher.epochs=200"])
    wait_for(lambda: len(read_metrics(place.metrics)) > 3, process)
    workers = [pid for pid, line in descendants(process.pid).items() if "gowide_dist.pipeline" in line]
    os.kill(max(workers), signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert list(place.checkpoints.glob("step-*.json"))


def test_ctrl_c_again_and_again_still_saves(start, command, place):
    process = start([*command, "stages.teacher.epochs=200"])
    wait_for(lambda: len(read_metrics(place.metrics)) > 3, process)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert list(place.checkpoints.glob("step-*.json"))


def test_whoever_reads_its_output_may_leave(command, place):
    """As `gowide run JOB | head -1` does."""
    with subprocess.Popen([GOWIDE, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        process.stdout.readline()
        process.stdout.close()
        process.wait(LIMIT_S)
    assert place.done is not None


def test_a_disk_that_is_really_full(command, place):
    """PyTorch's own writer raises a RuntimeError for it."""
    runs = Path(command[command.index("--runs") + 1])
    runs.mkdir()
    script = f"mount -t tmpfs -o size=100k tmpfs {runs} && exec {GOWIDE} {' '.join(command)} checkpoints.every_steps=1"
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("gowide: ")] == [
        f"gowide: {place.path.parents[2]}: disk full or quota exceeded; free space and run the same command again"
    ]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("GOWIDE_COLLECTIVE_TIMEOUT_S", "ten", "should be a whole number"),
        ("GOWIDE_COLLECTIVE_TIMEOUT_S", "0", "should be a whole number, 1 or more"),
        ("GOWIDE_LOCK_WAIT_S", "-3", "should be a whole number"),
        ("OMP_NUM_THREADS", "1.5", "should be a whole number"),  # libgomp has a word of its own
        ("GLOO_SOCKET_IFNAME", "eth9", "this node has no such network interface"),
        ("SUBMITIT_PREEMPT_SIGNAL", "KILL", "should be a signal that can be waited for"),
        ("SUBMITIT_PREEMPT_SIGNAL", "SIGUSR1", "should be a signal that can be waited for"),
    ],
)
def test_a_variable_that_cannot_be(command, place, monkeypatch, variable, value, says):
    monkeypatch.setenv(variable, value)
    result = gowide(*command)
    assert result.returncode == 2
    assert f"gowide: {variable}={value}: {says}" in result.stderr
    assert "Traceback" not in result.stderr
    assert place.done is None


def test_a_torchrun_of_ones_own_where_gpus_are_promised(command, place, monkeypatch):
    """And what another torchrun has left in the environment does not matter."""
    monkeypatch.setenv("PET_NNODES", "2")
    assert gowide(*command).returncode == 0
    monkeypatch.delenv("PET_NNODES")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    words = ["--standalone", "--nproc-per-node=2", "-m", "gowide_dist.pipeline", place.path.parents[2], place.key]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "2 GPUs are expected on this node, but PyTorch" in result.stderr


def test_a_limit_on_the_size_of_files(command, place):
    script = f"ulimit -f 20 && exec {GOWIDE} {' '.join(command)} checkpoints.every_steps=1"  # blocks of 512 or 1,024 B
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert result.returncode == 2, result.stderr
    assert "File too large; raise the limit" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert place.done is None


def test_what_a_killed_writer_has_left_is_gone_in_the_end(command, place):
    place.checkpoints.mkdir(parents=True)
    left = [place.path / ".done.json.node-1", place.checkpoints / ".step-00000001.pt.node-2"]
    for path in left:
        path.write_text("half")
    assert gowide(*command).returncode == 0
    assert not any(path.exists() for path in left)


def test_a_worker_that_stands_still_is_waited_for_aloud(start, command, place):
    process = start([*command, "stages.teacher.epochs=200"])
    wait_for(lambda: len(read_metrics(place.metrics)) > 3, process)
    workers = [pid for pid, line in descendants(process.pid).items() if "gowide_dist.pipeline" in line]
    os.kill(max(workers), signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + LIMIT_S
    while "waiting for the processes to save" not in (line := process.stderr.readline()):
        assert line, "it has ended"
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGQUIT)  # as the line says
    assert process.wait(LIMIT_S) == -signal.SIGQUIT
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_output_on_a_full_disk(command, place):
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [GOWIDE, *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S, check=False
        )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "disk full" in result.stderr
    assert place.done is None


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", "nvidia-smi fails (NVIDIA-SMI has failed: no driver)"),
        ("kill -9 $$", "nvidia-smi fails ()"),
    ],
)
def test_a_broken_driver_is_not_taken_for_no_gpu(tmp_path, monkeypatch, script, line):
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError) as error:
        local._installed_gpus.__wrapped__()
    assert line in str(error.value)
    assert "repair the driver" in str(error.value)


def test_errors_with_whatever_in_them_reach_the_launcher(tmp_path):
    (tmp_path / "odd_error.py").write_text(
        "import sys\n"
        "from gowide_dist.errors import UserError\n"
        "from gowide_dist.launch.local import leave\n"
        "from gowide_dist.pipeline import work\n"
        "from pathlib import Path\n"
        "def fail():\n"
        "    raise UserError('a name that is not UTF-8: ' + b'\\xff'.decode(errors='surrogateescape'))\n"
        "leave(work(fail, Path.cwd()))\n"
    )
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    try:
        with pytest.raises(UserError, match="a name that is not UTF-8"):
            torchrun("odd_error", [], 2)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def test_gloos_timeout_names_its_cause():
    from gowide_dist.world import peer_failure

    line = peer_failure(RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms"))
    assert "GOWIDE_COLLECTIVE_TIMEOUT_S" in line
    assert peer_failure(OSError(errno.EIO, "Input/output error")) is None
