"""Sites that forbid requeueing, or cancel what they preempt: what is saved, what `status` says, how it goes on."""

import json
import re
import shutil
import sys
from pathlib import Path

from gowide_dist.launch.queue import read_jobs
from gowide_dist.run import Run
from tests.command import gowide
from tests.fashion import chain
from tests.slurm.conftest import Submitted, until

PACKAGE = Path(__file__).parents[2] / "gowide_dist"
KEY, CHILD = "teacher/wide", "imitate/thin"


def without_slurm(folder):
    """What runs Python where the commands of Slurm cannot be executed, as in a container."""
    path = folder / "enter"
    commands = " ".join(shutil.which(name) for name in ("scontrol", "sbatch", "squeue", "scancel"))
    hide = f'for each in {commands}; do mount --bind /dev/null "$each"; done; exec "$@"'
    path.write_text(f"#!/bin/bash\nexec unshare --mount bash -c '{hide}' enter {sys.executable} \"$@\"\n")
    path.chmod(0o755)
    return str(path)


def test_follow_up_jobs(cluster, long_stage, undisturbed, tmp_path):
    """With `requeue: false` the batch script submits the next job, for which the children then wait."""
    imitate = chain(tmp_path)["stages"]["imitate"]
    recipe = {**long_stage, "stages": {**long_stage["stages"], "imitate": imitate}}
    states = tmp_path / "states"
    notify = f'echo "$GOWIDE_STATE $GOWIDE_STAGE ${{GOWIDE_RUN##*/}} $SLURM_JOB_ID" >> {states}; exit 1'
    submitted = Submitted(
        cluster, tmp_path, recipe, requeue=False, notify=notify, python=without_slurm(tmp_path), setup=["set -eu"]
    )
    submitted.submit()
    first, child = submitted.id(KEY), submitted.id(CHILD)
    submitted.reaches(KEY, 30)
    cluster.run("scancel", "--signal=USR2", first)  # as before the end of an allocation
    until(lambda: submitted.id(KEY) != first, "the follow-up")
    second = submitted.id(KEY)
    until(lambda: cluster.run("squeue", "-h", "-j", first, "--states=all", "-o", "%T") == "COMPLETED\n", "its end")
    assert f"afterok:{second}(" in cluster.run("squeue", "-h", "-j", child, "-o", "%E")
    submitted.reaches(KEY, 130)
    assert submitted.submit().count("already") == 0, "nothing is submitted again"
    assert (submitted.id(KEY), submitted.id(CHILD)) == (second, child)
    submitted.signal(KEY, 9, 0)  # a crash: the others end, and another follow-up begins
    done = submitted.finishes(KEY)
    assert done.model_sha256 == undisturbed.model_sha256
    assert submitted.finishes(CHILD)
    assert submitted.id(CHILD) == child
    third = submitted.id(KEY)
    assert (submitted.run.slurm / f"{third}_retries").read_text().count("\n") == 1
    until(lambda: states.read_text().count("\n") == 4, "the last word")
    assert states.read_text().splitlines() == [
        f"requeued {KEY} long {first}", f"requeued {KEY} long {second}", f"done {KEY} long {third}",
        f"done {CHILD} long {child}",
    ]  # fmt: skip


def test_a_controller_that_refuses(cluster, long_stage, undisturbed, tmp_path):
    """And the package changes between the submission and the start of the job, which runs it as it was."""
    checkout = tmp_path / "checkout"
    shutil.copytree(PACKAGE, checkout / PACKAGE.name)
    states = tmp_path / "states"
    submitted = Submitted(
        cluster, tmp_path, long_stage, sbatch={"hold": True}, environment={"PYTHONPATH": ""},
        notify=f"echo $GOWIDE_STATE >> {states}",
    )  # fmt: skip
    arguments = ["submit", submitted.job, "--cluster", submitted.profile, "--runs", submitted.runs]
    own_code = {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    assert gowide(*arguments, cwd=checkout, env=own_code).returncode == 0
    assert "JobHeldUser\n" in gowide("status", submitted.run.path, env=own_code).stdout
    with (checkout / PACKAGE.name / "pipeline.py").open("a") as file:
        file.write("raise SystemExit('edited')\n")
    told = "JobHeldUser; runs the package as it was submitted; it has changed since\n"
    assert told in gowide("status", submitted.run.path, env=own_code).stdout
    cluster.run("scontrol", "release", submitted.id(KEY))
    submitted.reaches(KEY, 30)

    cluster.run("scontrol", "update", f"JobId={submitted.id(KEY)}", "Requeue=0")
    cluster.run("scancel", "--signal=USR2", submitted.id(KEY))
    until(lambda: submitted.squeue(KEY, "State") == "FAILED", "the end of the job")
    assert states.read_text() == "failed\n"
    step = int(submitted.log(KEY).split("saved at step ")[1].split(" ")[0])
    told = f"Slurm refuses to queue its job again; saved at step {step}, `gowide submit` continues there"
    assert told in submitted.status()
    submitted.submit()
    cluster.run("scontrol", "release", submitted.id(KEY))
    assert submitted.finishes(KEY).model_sha256 == undisturbed.model_sha256
    environment = json.loads((submitted.run.path / "environment.json").read_text())
    assert environment["commit"] is None, "as noted at the copy of the checkout, which is no repository"


def test_three_seeds_in_one_command(cluster, data, tmp_path):
    """One teacher, trained once; the students side by side; then one report."""
    recipe = chain(data, name="study")
    recipe["stages"] = {name: recipe["stages"][name] for name in ("teacher", "imitate")}
    submitted = Submitted(cluster, tmp_path, recipe, nodes=1)
    printed = submitted.submit("--seeds", "0,1,2")
    teacher = submitted.id(KEY)
    assert printed.count(f"{KEY}  job {teacher} of another seed") == 2
    jobs = [read_jobs(submitted.runs / name / "slurm") for name in ("study", "study-1", "study-2")]
    assert [[*each] for each in jobs] == [[KEY, CHILD], [CHILD], [CHILD]]
    again = submitted.submit("--seeds", "0,1,2")
    assert again == printed, "nothing is submitted twice"
    until(lambda: not cluster.run("squeue", "-h", "--states=PENDING,RUNNING,COMPLETING"), "the end of all jobs")
    runs = [Run(submitted.runs / name) for name in ("study", "study-1", "study-2")]
    students = {run.stage(CHILD).done.model_sha256 for run in runs}
    assert len(students) == 3
    assert len({run.stage(KEY).done.model_sha256 for run in runs}) == 1
    shown = gowide("status", submitted.run.path, "--seeds", "0,1,2", "--json").stdout
    assert [[row["state"] for row in rows] for rows in json.loads(shown).values()] == [["done", "done"]] * 3
    result = gowide("run", submitted.job, "--runs", submitted.runs, "--nproc", 1, "--seeds", "0,1,2")
    assert result.stdout.count("all 2 stages are done") == 3, result.stderr
    report = gowide("report", submitted.run.path, "--seeds", "0,1,2", "--no-measure").stdout
    for text in (report, result.stdout):
        assert re.search(r"imitate[ |]+thin[ |]+2[ |]+\S+ ± \S+[ |]+3 ", text), text


def test_networks_of_a_stage_in_one_job_and_in_two(cluster, data, tmp_path):
    """Two stages need the same stored logits, which a job of its own stores."""
    recipe = chain(data, name="one")
    slim = {**recipe["networks"]["thin"], "width": 0.25}
    kd = {"train": ["thin", "slim"], "objective": "kl", "teacher": "teacher", "teacher_logits": "stored",
          "epochs": 1, "optim": {"lr": 0.05}}  # fmt: skip
    hot = {**kd, "train": "thin", "temperature": 4.0}
    recipe |= {"networks": {**recipe["networks"], "slim": slim},
               "stages": {"teacher": recipe["stages"]["teacher"], "kd": kd, "hot": hot}}  # fmt: skip
    keys = [KEY, "teacher_logits/kd", "kd/thin", "kd/slim", "hot/thin"]
    one = Submitted(cluster, tmp_path, recipe, nodes=1)
    printed = one.submit()
    ids = [one.id(key) for key in keys]
    assert ids[2] == ids[3]
    assert len({*ids}) == 4
    after = f"job {ids[2]}  after {KEY}, teacher_logits/kd  {one.run.slurm}"
    assert [f"kd/{network}  {after}" in printed for network in ("thin", "slim")] == [True, True]
    assert "stores the teacher's logits for several stages" in one.status()
    until(lambda: not cluster.run("squeue", "-h", "--states=PENDING,RUNNING,COMPLETING"), "the end of all jobs")
    assert "waits for" not in one.log("kd/thin") + one.log("hot/thin")
    assert "stored the teacher's logits" in one.log("teacher_logits/kd")
    assert [row.split()[1] for row in one.status().splitlines()[1:]] == ["done"] * 4

    shutil.copytree(one.runs, tmp_path / "two" / "runs", ignore=shutil.ignore_patterns("slurm", "kd"))
    two = Submitted(cluster, tmp_path / "two", recipe, nodes=1, together=False)
    two.submit("--only", "kd")
    assert two.id("kd/thin") != two.id("kd/slim")
    for key in ("kd/thin", "kd/slim"):
        assert two.finishes(key).model_sha256 == one.run.stage(key).done.model_sha256


def test_preemption_that_cancels(cluster, long, undisturbed, tmp_path):
    """With a warning, a job that is cancelled saves and is queued again; without one, `gowide submit` goes on."""
    urgent = ["sbatch", "-p", "high", "-N", 4, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    cluster.run("scontrol", "update", "PartitionName=main", "PreemptMode=CANCEL", "GraceTime=60")
    try:
        told = tmp_path / "told"
        submitted = long(python=without_slurm(tmp_path), notify=f"sleep 1; echo $GOWIDE_STATE >> {told}")
        submitted.reaches(KEY, 30)
        cluster.run(*urgent)
        submitted.until(KEY, lambda: "continues at step" in submitted.log(KEY), "another start")
        assert told.read_text() == "requeued\n"
        submitted.reaches(KEY, 130)
        cluster.run("scontrol", "update", "PartitionName=main", "GraceTime=0")
        cluster.run(*urgent)
        until(lambda: submitted.squeue(KEY, "State") == "PREEMPTED", "its end")
    finally:
        cluster.run("scontrol", "update", "PartitionName=main", "PreemptMode=REQUEUE", "GraceTime=10")
    told = r"PREEMPTED: another job took its nodes; saved at step \d{3}, `gowide submit` continues there"
    assert re.search(told, submitted.status())
    submitted.submit()
    assert submitted.finishes(KEY).model_sha256 == undisturbed.model_sha256
