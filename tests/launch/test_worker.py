"""Training processes: what they check, and how they stop."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from gowide_dist import load_recipe
from gowide_dist.prepare import prepare
from gowide_dist.run import read_metrics
from tests.command import GOWIDE, HEARING, gowide
from tests.fashion import chain, encode_part, write_job


@pytest.fixture
def job(tmp_path):
    recipe = chain(encode_part(tmp_path, 600, 200), checkpoints={"every_minutes": 10})
    recipe["stages"]["teacher"]["epochs"] = 15
    return write_job(tmp_path, recipe)


def test_a_stage_whose_parent_is_not_finished(job, tmp_path):
    """Slurm starts jobs that depend on a job that it has forgotten."""
    run = prepare(load_recipe(job), tmp_path / "runs").run
    result = subprocess.run(
        [sys.executable, "-m", "gowide_dist.pipeline", run.path, "imitate/thin"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "imitate/thin: needs teacher/wide, which is not finished" in result.stderr
    assert not run.stage("imitate/thin").path.exists()


def test_a_torchrun_of_ones_own_on_two_nodes(job, tmp_path):
    """Two agents, as on two nodes, which meet on loopback: the weights of a run of as many processes here."""
    arguments = ["run", job, "--nproc", 2, "--only", "teacher", "stages.teacher.epochs=1"]
    printed = gowide(*arguments, "--runs", tmp_path / "two", "--write-only").stdout.splitlines()
    assert printed[-1] == f"-m gowide_dist.pipeline {tmp_path}/two/chain teacher/wide"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    agent = [sys.executable, "-m", "torch.distributed.run", *options, "--rdzv-id=x", "--local-addr=127.0.0.1"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    agents = [subprocess.Popen([*agent, *printed[-1].split()], env=env) for _ in range(2)]
    assert [each.wait(timeout=240) for each in agents] == [0, 0]
    assert gowide(*arguments, "--runs", tmp_path / "one").returncode == 0
    two, one = (
        json.loads((tmp_path / name / "chain" / "stages" / "teacher" / "wide" / "done.json").read_text())
        for name in ("two", "one")
    )
    assert (two["world_size"], two["model_sha256"]) == (2, one["model_sha256"])


def test_a_stalling_file_server_is_no_final_error(tmp_path):
    """The batch script tries again after a status other than that of an error that the user has to mend."""
    code = """
import os, sys
from gowide_dist.errors import RunError
from gowide_dist.pipeline import work

def task():
    try:
        raise OSError(int(sys.argv[1]), os.strerror(int(sys.argv[1])))
    except OSError as error:
        raise RunError(f"x: cannot be read ({error.strerror})") from None

print(work(task, sys.argv[2]))
"""
    for number, status in ((errno.ESTALE, 1), (errno.ELOOP, 2)):
        result = subprocess.run(
            [sys.executable, "-c", code, str(number), tmp_path], capture_output=True, text=True, check=False
        )
        assert (result.stdout, result.stderr) == (f"{status}\n", f"x: cannot be read ({os.strerror(number)})\n")


def test_ctrl_c_saves(job, tmp_path):
    """As a terminal sends it: to all processes of the command."""
    metrics = tmp_path / "runs" / "chain" / "stages" / "teacher" / "wide" / "metrics.jsonl"
    command = ["run", job, "--nproc", "2", "--runs", tmp_path / "runs", "--only", "teacher"]
    with subprocess.Popen(
        [*HEARING, GOWIDE, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while len(read_metrics(metrics)) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        printed, complaints = process.communicate(timeout=60)
    assert process.returncode == 130
    assert complaints == "gowide: stopped; run the same command again to resume\n"
    step = int(printed.split("saved at step ")[1].split(" ")[0])
    assert f"continues at step {step}" in gowide(*command).stdout
