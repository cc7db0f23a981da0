"""What is made of Slurm's answers, said here by stand-ins; tests/slurm asks a real one."""

import json
import os
from pathlib import Path

import pytest

from gowide_dist import load_recipe
from gowide_dist.files import try_lock
from gowide_dist.insight.status import cancel_run, logs, status
from gowide_dist.launch.chain import prepare_chain
from gowide_dist.launch.profile import load_profile
from gowide_dist.launch.queue import SlurmError, newest_jobs, write_job
from gowide_dist.prepare import write
from tests.command import refused
from tests.fashion import chain, encode_part
from tests.fashion import write_job as write_recipe

PROFILE = "nodes: 1\nnode_local: []\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return encode_part(tmp_path_factory.mktemp("fashion"), 120, 60)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Set what squeue and sacct print; `cancelled` is where scancel notes what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answer(squeue="", sacct=""):
        for name, text in (("squeue", squeue), ("sacct", sacct), ("scancel", ""), ("sbatch", "")):
            (folder / f"{name}.txt").write_text(text)
            script = f'#!/bin/sh\necho "$@" >> "{folder}/{name}.asked"\ncat "{folder}/{name}.txt"\n'
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        return folder

    answer()
    return answer


@pytest.fixture
def prepared(data, tmp_path):
    """Of a run whose teacher was job 101 and whose imitation is job 102; call it to prepare what is to be submitted."""
    job = write_recipe(tmp_path, chain(data, name="q"))
    (tmp_path / "profile.yaml").write_text(PROFILE)
    folder = tmp_path / "runs" / "q" / "slurm"
    folder.mkdir(parents=True)
    write_job(folder, "teacher/wide", "101")
    write_job(folder, "imitate/thin", "102")
    return lambda: prepare_chain(load_recipe(job), tmp_path / "runs", load_profile(tmp_path / "profile.yaml"))


def test_names_may_hold_anything(tmp_path, slurm):
    write_job(tmp_path, "teacher/wide", "7")
    write_job(tmp_path, "distill/thin", "8")
    write_job(tmp_path, "gone/thin", "9")
    slurm(
        squeue="5|RUNNING|None|n1|0|N/A|a|b|\n7|PENDING|Priority||2|2026-01-01T00:00:00|run:teacher/wide|\n",
        sacct="8|COMPLETED|n2|run:distill/thin\n9|CANCELLED by 0|None assigned|an|other's job\n",
    )
    found = newest_jobs(tmp_path, "run")
    assert {key: (job.job_id, job.state, job.restarts) for key, job in found.items()} == {
        "teacher/wide": ("7", "PENDING", 2), "distill/thin": ("8", "COMPLETED", 0),
    }  # fmt: skip


def test_a_job_that_waits_for_one_that_failed_is_replaced(prepared, slurm):
    slurm(squeue="102|PENDING|Dependency||0|N/A|q:imitate/thin|\n", sacct="101|FAILED|n1|q:teacher/wide\n")
    _, found = prepared()
    assert found.stale == {"imitate/thin": "102"}
    assert found.queued == {}
    assert [job.key for job in found.jobs] == ["teacher/wide", "imitate/thin", "distill/thin", "finetune/thin"]


def test_a_job_whose_parent_is_on_its_way_is_left(prepared, slurm):
    slurm(squeue="101|RUNNING||n1|0|N/A|q:teacher/wide|\n102|PENDING|Dependency||0|N/A|q:imitate/thin|\n")
    _, found = prepared()
    assert (found.stale, found.queued) == ({}, {"teacher/wide": "101", "imitate/thin": "102"})
    assert [job.key for job in found.jobs] == ["distill/thin", "finetune/thin"]


def test_two_commands_do_not_submit_the_same_jobs(prepared, slurm):
    _, found = prepared()
    with try_lock(found.folder / "lock"), pytest.raises(SlurmError, match="has just submitted jobs of this run"):
        found.submit()
    write_job(found.folder, "teacher/wide", "103")  # by the other, which was faster
    with pytest.raises(SlurmError, match="has just submitted jobs of this run"):
        found.submit()


def test_jobs_of_a_stage_that_is_no_more(prepared, slurm, tmp_path):
    here, _ = prepared()
    write(here)
    write_job(here.run.slurm, "old/thin", "104")
    folder = slurm(squeue="104|PENDING|Priority||0|N/A|q:old/thin|\n")
    row = status(here.run)[-1]
    assert (row.stage, row.state, row.job, row.note) == ("old/thin", "queued", "104", "the recipe no longer has it")
    (here.run.slurm / "104_0_log.out").write_text("said\n")
    assert list(logs(here.run, "old")) == ["said\n"]
    assert cancel_run(here.run) == ["old/thin  job 104"]
    assert (folder / "scancel.asked").read_text() == "104\n"


def test_without_slurm_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    job = write_recipe(tmp_path, chain(data, name="q"))
    (tmp_path / "profile.yaml").write_text(PROFILE)
    line = refused("submit", job, "--cluster", tmp_path / "profile.yaml", "--runs", tmp_path / "runs")
    assert line.startswith("sbatch is not there: this is no machine of a Slurm cluster")
    assert not Path(tmp_path / "runs").exists()


def test_the_newest_error_is_told_however_often_it_began(prepared, slurm):
    """Accounting does not say how often a job was started."""
    here, _ = prepared()
    write(here)
    for start, line in ((0, "an old one"), (2, "out of memory"), (10, "the loss is not finite")):
        (here.run.slurm / f"101_{start}_error.json").write_text(json.dumps({"message": line}))
    slurm(sacct="101|FAILED|n1|q:teacher/wide\n")
    assert (status(here.run)[0].state, status(here.run)[0].note) == ("failed", "the loss is not finite")
