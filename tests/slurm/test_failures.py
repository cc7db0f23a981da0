"""One process of a job fails alone, on the stand-in for NCCL: the job ends at once, with its line, and is not tried again."""

from pathlib import Path

import pytest

from gowide_dist import load_recipe
from gowide_dist.launch import chain as chains
from gowide_dist.launch.profile import load_profile
from gowide_dist.launch.slurm import Worker
from gowide_dist.prepare import write_run
from tests.fashion import chain
from tests.slurm.conftest import Submitted, until

KEY, CHILD = "teacher/wide", "imitate/thin"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("data", "train.beton: image 7 is damaged; encode it again"),
        ("memory", "teacher/wide: out of memory; wide needs about"),
        ("disk at a save", "disk full or quota exceeded; free space"),
        ("disk at the finish", "disk full or quota exceeded; free space"),
    ],
)
def test_what_the_user_can_fix(cluster, data, tmp_path, monkeypatch, fault, line):
    moment = tmp_path / "moment"
    recipe = chain(data, name="faulty")
    recipe["stages"] = {name: recipe["stages"][name] for name in ("teacher", "imitate")}
    submitted = Submitted(cluster, tmp_path, recipe, environment={"PYTHONPATH": str(ROOT)})
    monkeypatch.setattr(
        chains, "Worker", lambda module, arguments: Worker("tests.faults", (fault, str(moment), *arguments))
    )
    prepared, jobs = chains.prepare_chain(load_recipe(submitted.job), submitted.runs, load_profile(submitted.profile))
    write_run(prepared)
    jobs.submit()
    until(lambda: submitted.squeue(KEY, "State") == "FAILED", "the end of the job", limit_s=60)
    until(lambda: submitted.squeue(CHILD, "State") == "CANCELLED", "the end of its child", limit_s=60)
    assert submitted.squeue(KEY, "RestartCnt") == "0"
    assert not list(submitted.run.slurm.glob("*_retries"))
    assert moment.exists()
    assert line in submitted.status()
    assert "Connection closed by peer" not in submitted.log(KEY)
