"""The chain as dependent jobs: in order, side by side, submitted once, cancelled when a parent fails."""

import json

from gowide_dist.launch.queue import read_jobs
from gowide_dist.recipe import Recipe
from tests.command import gowide, refused
from tests.fashion import chain
from tests.slurm.conftest import PROFILE, Submitted, until

STAGES = ["teacher/wide", "imitate/thin", "distill/thin", "finetune/thin"]


def test_the_chain_over_two_nodes_with_two_processes_each(cluster, data, tmp_path, monkeypatch):
    """Cancelled in the middle and submitted again, it ends with the weights of a run under torchrun.

    The shell that submits is another job's: what it says of times and memory is not for these.
    """
    for name, value in {"SBATCH_TIMELIMIT": "1", "SLURM_MEM_PER_CPU": "500", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    recipe = chain(data)
    recipe["stages"]["baseline"] = {**recipe["stages"]["teacher"], "train": "thin"}
    recipe["stages"]["distill"]["epochs"] = 1
    stages = list(Recipe.model_validate(recipe).instances)
    submitted = Submitted(cluster, tmp_path, recipe, processes_per_node=2)
    lines = [line.split() for line in submitted.submit().splitlines()]
    ids = {key: submitted.id(key) for key in stages}
    assert [line[:3] for line in lines] == [[key, "job", ids[key]] for key in stages]
    assert [line[3:-1] for line in lines] == [
        [], ["after", "teacher/wide"], ["after", "imitate/thin,", "teacher/wide"], ["after", "distill/thin"], [],
    ]  # fmt: skip
    assert submitted.squeue("distill/thin", "TimeLimit") == "30:00"
    assert lines[0][-1] == str(submitted.run.slurm / f"{ids['teacher/wide']}_0_log.out")

    both = ("teacher/wide", "baseline/thin")
    submitted.until(both[0], lambda: [submitted.squeue(key, "State") for key in both] == ["RUNNING"] * 2, "both beside")
    for key in both:
        submitted.finishes(key)
    submitted.until("imitate/thin", lambda: submitted.squeue("imitate/thin", "State") == "RUNNING", "its start")
    rows = {row["stage"]: row for row in json.loads(gowide("status", submitted.run.path, "--json").stdout)}
    assert [rows[key]["state"] for key in stages] == ["done", "running", "queued", "queued", "done"]
    assert rows["imitate/thin"]["where"] == "node[1-2]"
    assert "Dependency" in rows["distill/thin"]["note"]
    assert gowide("cancel", submitted.run.path).stdout.count("cancelled") == 3

    printed = submitted.submit()
    assert printed.splitlines()[0].split() == ["teacher/wide", "done"]
    assert [submitted.id(key) == ids[key] for key in stages] == [True, False, False, False, True]
    submitted.finishes("finetune/thin")
    until(lambda: not cluster.run("squeue", "-h"), "the end of the last job")
    assert [line.split() for line in submitted.submit().splitlines()] == [[key, "done"] for key in stages]
    assert "distill/thin  done: top-1" in gowide("logs", submitted.run.path, "distill", "-f").stdout

    result = gowide("run", submitted.job, "--nproc", 4, "--runs", tmp_path / "torchrun")
    assert result.returncode == 0, result.stderr
    for key in stages:
        by_torchrun = json.loads((tmp_path / "torchrun" / "chain" / "stages" / key / "done.json").read_text())
        assert submitted.run.stage(key).done.model_sha256 == by_torchrun["model_sha256"]


def test_a_failed_parent_cancels_its_children(cluster, data, tmp_path):
    submitted = Submitted(cluster, tmp_path, chain(data))
    submitted.submit("stages.teacher.optim.lr=1e30", "stages.teacher.schedule.warmup_epochs=1")
    until(lambda: not cluster.run("squeue", "-h"), "the end of all jobs")
    rows = {row["stage"]: row for row in json.loads(gowide("status", submitted.run.path, "--json").stdout)}
    assert [rows[key]["state"] for key in STAGES] == ["failed", "cancelled", "cancelled", "cancelled"]
    assert rows["teacher/wide"]["note"].startswith("teacher/wide: the loss is not finite at step")
    assert "lower stages.teacher.optim.lr" in submitted.log("teacher/wide")
    assert submitted.squeue("teacher/wide", "RestartCnt") == "0", "nothing that trying again could fix"


def test_a_refused_job(cluster, data, tmp_path):
    submitted = Submitted(cluster, tmp_path, chain(data), stages={"distill": {"partition": "nowhere"}})
    line = refused("submit", submitted.job, "--cluster", submitted.profile, "--runs", submitted.runs)
    assert line.startswith("distill/thin: sbatch: ")
    assert "invalid partition specified: nowhere" in line
    assert line.endswith("nothing was submitted")
    until(lambda: not cluster.run("squeue", "-h"), "an empty queue")
    assert "distill/thin" not in read_jobs(submitted.run.slurm)


def test_only_asking(cluster, data, tmp_path):
    submitted = Submitted(cluster, tmp_path, chain(data))
    answers = submitted.submit("--test-only").splitlines()
    assert [answer.split(": ")[0] for answer in answers] == STAGES
    assert all("to start at" in answer and "on nodes node[" in answer for answer in answers)
    submitted.profile.write_text(json.dumps({**PROFILE, "nodes": 9}))
    line = refused(
        "submit",
        submitted.job,
        "--cluster",
        submitted.profile,
        "--runs",
        submitted.runs,
        "--test-only",
        "batch_size=63",
    )
    assert line == "teacher/wide: sbatch: allocation failure: Requested node configuration is not available"
    assert not submitted.runs.exists()
