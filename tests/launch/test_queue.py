"""What is made of Slurm's answers, which stand-ins for its commands give; tests/slurm asks a real Slurm."""

import json
import os
import shutil
from pathlib import Path

import pytest

from gowide_dist import load_recipe
from gowide_dist.files import try_lock
from gowide_dist.insight.status import cancel_runs, logs, status
from gowide_dist.launch.chain import Action, prepare_chain
from gowide_dist.launch.profile import load_profile
from gowide_dist.launch.queue import SlurmError, newest_jobs, read_jobs, write_job
from gowide_dist.prepare import write_run
from gowide_dist.run import Run, runs_of_seeds
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
    """A function that prepares the chain of a run whose teacher was job 101 and whose imitation is job 102."""
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


def actions(chain):
    return {key: planned.action for key, planned in chain.planned.items()}


def test_a_job_that_waits_for_one_that_failed_is_replaced(prepared, slurm):
    slurm(squeue="102|PENDING|Dependency||0|N/A|q:imitate/thin|\n", sacct="101|FAILED|n1|q:teacher/wide\n")
    _, chain = prepared()
    assert actions(chain) == {
        "teacher/wide": Action.SUBMIT, "imitate/thin": Action.REPLACE,
        "distill/thin": Action.SUBMIT, "finetune/thin": Action.SUBMIT,
    }  # fmt: skip
    assert chain.planned["imitate/thin"].slurm_id == "102"
    assert chain.in_jobs == set()
    assert [job.key for job in chain.jobs] == ["teacher/wide", "imitate/thin", "distill/thin", "finetune/thin"]


def test_a_job_whose_parent_has_a_job_is_left_alone(prepared, slurm):
    slurm(squeue="101|RUNNING||n1|0|N/A|q:teacher/wide|\n102|PENDING|Dependency||0|N/A|q:imitate/thin|\n")
    _, chain = prepared()
    assert chain.in_jobs == {"teacher/wide", "imitate/thin"}
    assert [job.key for job in chain.jobs] == ["distill/thin", "finetune/thin"]
    assert ["#SBATCH --dependency=afterok:102:101" in script for script in chain.scripts()] == [True, False]


def test_a_job_that_is_being_ended_is_followed_by_another(prepared, slurm):
    slurm(squeue="101|COMPLETING||n1|0|N/A|q:teacher/wide|\n102|PENDING|Dependency||0|N/A|q:imitate/thin|\n")
    _, chain = prepared()
    found = actions(chain)
    assert (found["teacher/wide"], found["imitate/thin"]) == (Action.FOLLOW, Action.REPLACE)
    assert chain.in_jobs == {"teacher/wide"}
    scripts = chain.scripts()
    assert "#SBATCH --dependency=afterany:101\n" in scripts[0]
    assert "#SBATCH --dependency=afterok:ID_OF_teacher/wide\n" in scripts[1]


def test_two_commands_do_not_submit_the_same_jobs(prepared, slurm):
    _, chain = prepared()
    with try_lock(chain.folder / "lock"), pytest.raises(SlurmError, match="has just submitted jobs of this run"):
        chain.submit()
    write_job(chain.folder, "teacher/wide", "103")  # by another command, which was faster
    with pytest.raises(SlurmError, match="has just submitted jobs of this run"):
        chain.submit()


def test_sbatch_is_asked_about_a_script_on_its_standard_input(prepared, slurm):
    sbatch = slurm() / "sbatch"
    sbatch.write_text("#!/bin/sh\necho $@ $(grep -o 'job-name=.*') >&2\n")
    _, chain = prepared()
    assert chain.try_out() == [f"{job.key}: --test-only job-name={job.name}" for job in chain.jobs]
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    with pytest.raises(SlurmError, match="teacher/wide: sbatch: no such partition"):
        chain.try_out()


def test_jobs_of_a_stage_that_the_recipe_no_longer_has(prepared, slurm, tmp_path):
    plan, _ = prepared()
    write_run(plan)
    write_job(plan.run.slurm, "old/thin", "104")
    folder = slurm(squeue="104|PENDING|Priority||0|N/A|q:old/thin|\n")
    row = status(plan.run)[-1]
    assert (row.stage, row.state, row.job, row.note) == ("old/thin", "queued", "104", "no longer in the recipe")
    (plan.run.slurm / "104_0_log.out").write_text("printed\n")
    assert list(logs(plan.run, "old")) == ["printed\n"]
    assert cancel_runs([plan.run]) == ["old/thin  job 104"]
    assert (folder / "scancel.asked").read_text() == "104\n"


def test_the_runs_of_seeds_are_cancelled_children_first(prepared, slurm, tmp_path):
    plan, _ = prepared()
    write_run(plan)
    names = [run.path.name for seeds in ([0, 3], [3]) for run in runs_of_seeds(plan.run, seeds)]
    assert names == ["q", "q-3", "q-3"]
    assert [run.path.name for run in runs_of_seeds(Run(tmp_path / "own-seed-absent"), [3])] == ["own-seed-absent-3"]
    runs = runs_of_seeds(plan.run, [0, 3])
    shutil.copytree(runs[0].path, runs[1].path)
    write_job(runs[1].slurm, "imitate/thin", "103")
    folder = slurm(squeue="".join(f"10{n}|PENDING|Priority||0|N/A|q:imitate/thin|\n" for n in (2, 3)))
    assert cancel_runs(runs) == [f"{run.path}: imitate/thin  job 10{n}" for run, n in zip(runs, (2, 3), strict=True)]
    assert (folder / "scancel.asked").read_text() == "103 102\n"


def test_without_slurm_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    job = write_recipe(tmp_path, chain(data, name="q"))
    (tmp_path / "profile.yaml").write_text(PROFILE)
    line = refused("submit", job, "--cluster", tmp_path / "profile.yaml", "--runs", tmp_path / "runs")
    assert line.startswith("sbatch not found: this machine belongs to no Slurm cluster")
    assert not Path(tmp_path / "runs").exists()


def test_the_error_of_the_newest_start_is_told(prepared, slurm):
    """Accounting does not say how often a job was started."""
    plan, _ = prepared()
    write_run(plan)
    for start, line in ((0, "an old one"), (2, "out of memory"), (10, "the loss is not finite")):
        (plan.run.slurm / f"101_{start}_error.json").write_text(json.dumps({"message": line}))
    slurm(sacct="101|FAILED|n1|q:teacher/wide\n")
    assert (status(plan.run)[0].state, status(plan.run)[0].note) == ("failed", "the loss is not finite")


def test_a_busy_controller_does_not_end_what_follows_a_log(prepared, slurm, monkeypatch):
    plan, _ = prepared()
    write_run(plan)
    log = plan.run.slurm / "101_0_log.out"
    log.write_text("one\n")
    folder = slurm()
    busy = f"#!/bin/sh\nif [ -e {folder}/asked ]; then exit 0; fi\ntouch {folder}/asked; echo two >> {log}; exit 1\n"
    (folder / "squeue").write_text(busy)
    monkeypatch.setattr("gowide_dist.insight.status.FOLLOW_EVERY_S", 0.01)
    assert "".join(logs(plan.run, "teacher", follow=True)) == "one\ntwo\n"


def test_follow_up_jobs_and_what_ended_a_job_from_outside(prepared, slurm):
    """Batch scripts note the jobs that they have submitted; `status` says what is saved."""
    plan, _ = prepared()
    write_run(plan)
    (plan.run.slurm / "101_next").write_text("105\n")
    (plan.run.slurm / "105_next").write_text("106\n")
    assert read_jobs(plan.run.slurm) == {"teacher/wide": ["101", "105", "106"], "imitate/thin": ["102"]}
    for state, words in (("TIMEOUT", "its time ended before it could save"), ("NODE_FAIL", "its node failed")):
        slurm(sacct=f"106|{state}|n1|q:teacher/wide\n")
        row = status(plan.run)[0]
        told = f"{state}: {words}; nothing is saved yet, `gowide submit` begins it again"
        assert (row.job, row.state, row.restarts, row.note) == ("106", "stopped", 2, told)
