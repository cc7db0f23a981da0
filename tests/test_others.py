"""A chain with networks of others and a rounded one, in two processes, ended by SIGKILL on the way: the same bits."""

from functools import partial
from pathlib import Path

import pytest

from gowide_dist.data.preprocessing import read_preprocessing
from gowide_dist.run import Run
from tests.command import gowide, killed_when
from tests.fashion import chain, encode_part, write_job

NETS = Path(__file__).parent / "networks" / "nets.py"
OPTIM = {"lr": 0.05}
TAUGHT = {"epochs": 1, "optim": OPTIM, "teacher": "teacher"}
IMITATES = {**TAUGHT, "objective": "blocks", "classifier": "fresh"}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A teacher of timm's and a student of ours, by its logits and, through transforms, by its blocks; a teacher and a
    student of the user's own, whose dropout draws at random, with a moving average.
    """
    folder = tmp_path_factory.mktemp("others")
    recipe = chain(encode_part(folder, 300, 60), checkpoints={"every_steps": 1})
    recipe["networks"] = {
        "public": {"timm": "test_efficientnet", "blocks": ["blocks.1", "blocks.2"]},
        "thin": {"block": "basic", "depths": [1, 1], "base": 8, "stem": "imagenet"},
        "wide": {"own": "Staged", "width": 16},
        "own": {"own": "Staged"},
    }
    labels = {"objective": "labels", "epochs": 1, "optim": OPTIM}
    recipe["stages"] = {
        "teacher": {"train": "public", **labels},
        "kl": {"train": ["thin", "own"], **TAUGHT, "objective": "kl"},
        "blocks": {"train": "thin", **IMITATES, "epochs": 2},
        "eight": {
            "train": ["thin", "own"], "init": "kl", **TAUGHT, "objective": "kl", "quantised": True, "mixup": 0.2,
            "optim": {**OPTIM, "ema": 0.9, "accumulate": 2},
        },
        "own_teacher": {"train": "wide", **labels},
        "own_blocks": {
            "train": "own",
            **IMITATES,
            "teacher": "own_teacher",
            "epochs": 2,
            "optim": {**OPTIM, "ema": 0.9},
        },
    }  # fmt: skip
    return write_job(folder, recipe)


def has_checkpoints(stage_dir):
    return any(stage_dir.checkpoints.glob("step-*.json"))  # which makes it whole


def weights(run):
    return {key: run.stage(key).done.model_sha256 for key in run.recipe().instances}


def test_a_chain_that_is_killed_ends_with_the_same_bits(job, tmp_path):
    """And goes on with the run's own copy of the file of networks."""
    undisturbed, killed = (Run(tmp_path / name / "chain") for name in ("a", "b"))
    done = gowide("run", job, "--networks", NETS, "--nproc", 2, "--runs", undisturbed.path.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    command = ["run", job, "--nproc", 2, "--runs", killed.path.parent]
    for stage in ("teacher/public", "eight/own", "own_blocks/own"):
        networks = [] if killed.networks.exists() else ["--networks", NETS]
        killed_when(partial(has_checkpoints, killed.stage(stage)), *command, *networks)
    done = gowide(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "own_blocks/own  continues at step" in done.stdout
    assert len(read_preprocessing(killed.stage("eight/own").model).quantisation.ranges) == 4
    assert weights(killed) == weights(undisturbed)
