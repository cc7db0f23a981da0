"""Whatever a cluster does to a job, it ends with the weights of an undisturbed job."""

import signal

from tests.command import gowide
from tests.slurm.conftest import until

KEY = "teacher/wide"


def check_same(submitted, undisturbed):
    done = submitted.finishes(KEY)
    assert done.model_sha256 == undisturbed.model_sha256
    assert (done.steps, done.images, done.world_size) == (300, 18_000, 2)


def continued_at(submitted):
    """The step at which it continued after its first stop."""
    submitted.until(KEY, lambda: "continues at step" in submitted.log(KEY), "another start")
    return int(submitted.log(KEY).split("continues at step ")[1].split(" ")[0])


def check_nothing_lost(submitted):
    """It continued exactly where it was told to stop: not at an older, periodic checkpoint."""
    assert f"stop requested; saved at step {continued_at(submitted)} of 300" in submitted.log(KEY)


def test_a_time_limit(long, undisturbed):
    """The stage is frozen, to take longer than its limit of a minute; Slurm's warning wakes it."""
    submitted = long(timeout_min=1, signal_delay_s=20)
    submitted.reaches(KEY, 30)
    submitted.signal(KEY, signal.SIGSTOP)
    check_nothing_lost(submitted)
    check_same(submitted, undisturbed)


def test_preemption(cluster, long, undisturbed):
    submitted = long()
    submitted.reaches(KEY, 30)
    cluster.run("sbatch", "-p", "high", "-N", 4, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    check_nothing_lost(submitted)
    check_same(submitted, undisturbed)


def test_requeue(cluster, long, undisturbed):
    submitted = long()
    submitted.reaches(KEY, 130)
    cluster.run("scontrol", "requeue", submitted.id(KEY))
    assert continued_at(submitted) >= 100
    check_same(submitted, undisturbed)
    assert submitted.squeue(KEY, "RestartCnt") == "1"


def test_a_power_cut(cluster, long, undisturbed):
    submitted = long()
    submitted.reaches(KEY, 130)
    cluster("kill-node", 2)
    try:
        assert continued_at(submitted) % 100 == 0
        check_same(submitted, undisturbed)
    finally:
        cluster("start-node", 2)
        until(lambda: len(cluster.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle").splitlines()) == 4, "node 2")


def test_a_process_that_dies_and_one_that_hangs(long, undisturbed):
    submitted = long(collective_timeout_s=20)
    submitted.reaches(KEY, 30)
    submitted.signal(KEY, signal.SIGKILL, 1)
    submitted.until(KEY, lambda: submitted.log(KEY).count("Starting with") == 2, "the second start")
    submitted.reaches(KEY, 110)
    submitted.signal(KEY, signal.SIGSTOP, 1)
    submitted.until(KEY, lambda: submitted.log(KEY).count("Starting with") == 3, "the third start")
    check_same(submitted, undisturbed)


def test_cancel_and_submit_again(long, undisturbed):
    """The stage is frozen, not to be finished before it is cancelled; Slurm wakes what it cancels."""
    submitted = long()
    submitted.reaches(KEY, 30)
    submitted.signal(KEY, signal.SIGSTOP)
    first = submitted.id(KEY)
    submitted.submit()
    assert submitted.id(KEY) == first, "a job that runs is not submitted twice"
    assert gowide("cancel", submitted.run.path).stdout == f"cancelled {KEY}  job {first}\n"
    submitted.submit()
    assert submitted.id(KEY) != first
    check_same(submitted, undisturbed)


def test_another_number_of_processes(cluster, long, undisturbed):
    submitted = long(nodes="1-2")
    submitted.reaches(KEY, 30)
    cluster.run("scontrol", "update", "NodeName=node[2-4]", "State=DRAIN", "Reason=test")
    try:
        cluster.run("scontrol", "requeue", submitted.id(KEY))
        done = submitted.finishes(KEY)
    finally:
        cluster.run("scontrol", "update", "NodeName=node[2-4]", "State=RESUME")
    assert done.world_size == 1
    assert (done.steps, done.images) == (undisturbed.steps, undisturbed.images)
    assert done.stream == undisturbed.stream
    assert abs(done.top1 - undisturbed.top1) < 15
