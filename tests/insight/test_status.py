"""Where a run stands, told without Slurm."""

import json
import os
import platform

import pytest

from gowide_dist import load_recipe
from gowide_dist.data.encode import encode
from gowide_dist.insight.status import status, status_table
from gowide_dist.prepare import prepare
from tests.command import gowide, refused
from tests.fashion import chain, write_job, write_part


@pytest.fixture
def run(tmp_path):
    write_part(tmp_path / "idx", 120, 60)
    encode("fashion-mnist", tmp_path / "data", tmp_path / "idx")
    recipe = load_recipe(write_job(tmp_path, chain(tmp_path / "data")))
    return prepare(recipe, tmp_path / "runs").run


def test_a_run_that_has_not_begun(run):
    rows = json.loads(gowide("status", run.path, "--json").stdout)
    assert [(row["stage"], row["state"], row["steps"]) for row in rows] == [
        ("teacher/wide", "absent", 4), ("imitate/thin", "absent", 4),
        ("distill/thin", "absent", 4), ("finetune/thin", "absent", 2),
    ]  # fmt: skip


def test_a_run_on_this_machine(run):
    stage_dir = run.stage("teacher/wide")
    row = {"kind": "train", "step": 3, "images_per_s": 30.0}
    writer = f"process {os.getpid()} on {platform.node()}"
    with stage_dir.lock():
        stage_dir.metrics.write_text(json.dumps(row) + "\n")
        running = status(run)[0]
    assert (running.state, running.where, running.step, running.images_per_s) == ("running", writer, 3, 30.0)
    assert running.seconds_left == 2
    assert status_table([running]).splitlines()[1].split() == [
        "teacher/wide", "running", *writer.split(), "3/4", "30", "0:02",
    ]  # fmt: skip
    stopped = status(run)[0]
    assert (stopped.state, stopped.seconds_left) == ("stopped", None)


def test_no_run_and_no_job(run, tmp_path):
    assert "not a run directory" in refused("status", tmp_path / "nothing")
    assert refused("status", run.path.parent).endswith(f"runs in it: {run.path}")
    assert "no stage of it was submitted to Slurm" in refused("logs", run.path, "teacher")
    assert gowide("cancel", run.path).stdout == f"{run.path}: no job is queued or running\n"
