"""The sbatch scripts, letter by letter: what goes out to a cluster changes only on purpose."""

import re
import sys
from pathlib import Path

import pytest

from gowide_dist.errors import RunError
from gowide_dist.launch.profile import Profile
from gowide_dist.launch.slurm import check_folder
from tests.command import gowide, refused
from tests.fashion import chain, write_job

HERE = Path(__file__).parent
CLUSTERS = HERE.parents[1] / "slurm" / "clusters"


@pytest.fixture
def job(tmp_path):
    """The chain beside a plain student, on images that are not there."""
    recipe = chain(tmp_path, batch_size=64)
    recipe["stages"]["baseline"] = {**recipe["stages"]["teacher"], "train": "thin"}
    return write_job(tmp_path, recipe)


def without_this_place(scripts):
    return re.sub(r"/code/[0-9a-f]{16}", "/code/DIGEST", scripts.replace(sys.executable, "PYTHON"))


@pytest.mark.parametrize("cluster", ["gpu8", "cpu", "devcluster"])
def test_the_scripts_of_a_chain(job, tmp_path, cluster):
    """Delete a golden file, and it is written anew."""
    runs = Path("/shared/runs")
    result = gowide("submit", job, "--cluster", CLUSTERS / f"{cluster}.yaml", "--runs", runs, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "dataset.json: not found" in result.stderr
    scripts = without_this_place(result.stdout)
    golden = HERE / "golden" / f"{cluster}.sh"
    if not golden.exists():
        golden.write_text(scripts)
        pytest.fail(f"{golden} was written: look at it and run the test again")
    assert scripts == golden.read_text()
    assert not runs.exists()


def test_seeds_share_the_teacher(job):
    arguments = ["--cluster", CLUSTERS / "devcluster.yaml", "--runs", "/shared", "--dry-run", "--seeds", "0,3"]
    scripts = gowide("submit", job, *arguments).stdout.split("#!/bin/bash")[1:]
    names = [re.search(r"--job-name=(.*)", script)[1] for script in scripts]
    stages = ["teacher/wide", "imitate/thin", "distill/thin", "finetune/thin", "baseline/thin"]
    assert names == [f"chain:{stage}" for stage in stages] + [f"chain-3:{stage}" for stage in stages[1:]]
    assert "--dependency=afterok:ID_OF_teacher/wide_OF_chain\n" in scripts[5]
    assert "--dependency=afterok:ID_OF_imitate/thin:ID_OF_teacher/wide_OF_chain\n" in scripts[6]
    stored = ["data.seed=0", "stages.distill.teacher_logits=stored"]
    scripts = gowide("submit", job, *arguments, *stored).stdout.split("#!/bin/bash")[1:]
    of_distill = [script for script in scripts if re.search("--job-name=chain.*:distill/", script)]
    assert sum("--job-name=chain:teacher_logits/distill\n" in script for script in scripts) == 1
    assert "ID_OF_teacher_logits/distill\n" in of_distill[0]
    assert "ID_OF_teacher_logits/distill_OF_chain\n" in of_distill[1]
    for seeds in ("0,0", "0,", "-1", "a"):
        line = refused("submit", job, *arguments[:-1], seeds)
        assert line == f"--seeds {seeds}: should be different whole numbers with commas between, as 0,1,2"


def test_a_folder_that_other_nodes_do_not_see(job, tmp_path):
    line = refused("submit", job, "--cluster", CLUSTERS / "gpu8.yaml", "--runs", "/tmp/runs")
    assert "/tmp/runs/chain/slurm: /tmp is local to each node; take a folder that all nodes share" in line
    with pytest.raises(RunError, match="/50%j: Slurm replaces what follows a % in names of logs"):
        check_folder(Path("/50%j"), Profile())


def test_processes_that_cannot_share_the_batch(job):
    profile = CLUSTERS / "gpu8.yaml"
    result = gowide("submit", job, "--cluster", profile, "--runs", "/shared", "--dry-run", "batch_size=36")
    assert result.returncode == 2
    assert "batch_size: 36 is not divisible by 8 processes" in result.stderr


def test_synchronised_batch_norm_needs_gpus(job):
    arguments = ["--runs", "/shared", "--dry-run", "sync_batch_norm=true", "batch_size=64"]
    assert gowide("submit", job, "--cluster", CLUSTERS / "gpu8.yaml", *arguments).returncode == 0
    result = gowide("submit", job, "--cluster", CLUSTERS / "devcluster.yaml", *arguments)
    assert result.returncode == 2
    assert "sync_batch_norm: PyTorch has it for GPUs only" in result.stderr


def test_without_slurm(job, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    profile = CLUSTERS / "devcluster.yaml"
    result = gowide("submit", job, "--cluster", profile, "--runs", tmp_path / "runs", "--test-only")
    assert result.returncode == 2
    line = "sbatch not found: this machine belongs to no Slurm cluster; `gowide run` trains here"
    assert result.stderr.splitlines()[-1] == f"gowide: teacher/wide: {line}"


def test_the_script_of_an_encode(tmp_path):
    """One task with a node's CPUs and no GPU, on the partition that the profile names for it."""
    profile = tmp_path / "profile.yaml"
    profile.write_text((CLUSTERS / "gpu8.yaml").read_text() + "encode: {partition: cpu, timeout_min: 600}\n")
    out, root = Path("/shared/data/imagenet"), Path("/shared/imagenet")
    arguments = ["encode", "imagefolder", "--root", root, "--out", out, "--cluster", profile, "--dry-run"]
    result = gowide(*arguments)
    assert result.returncode == 0, result.stderr
    script = without_this_place(result.stdout)
    golden = HERE / "golden" / "encode.sh"
    if not golden.exists():
        golden.write_text(script)
        pytest.fail(f"{golden} was written: look at it and run the test again")
    assert script == golden.read_text()
    assert not out.parent.exists()
