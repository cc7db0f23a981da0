"""Training processes: what they check, and how they stop."""

import os
import signal
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
