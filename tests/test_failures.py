"""One process fails while the others wait for it in a collective, as NCCL would let them wait: for ever.

Each case ends within seconds, with the one line that helps, whoever found the fault.
"""

import time

import pytest

from gowide_dist import load_recipe
from gowide_dist.errors import InternalError, UserError
from gowide_dist.launch.local import WorkerError, torchrun
from gowide_dist.prepare import prepare
from tests.fashion import chain, encode_part, write_job

LIMIT_S = 10
COLLECTIVE_TIMEOUT_S = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return encode_part(tmp_path_factory.mktemp("fashion"), 240, 100)


@pytest.fixture
def fail(data, tmp_path, monkeypatch):
    """Train with a fault; what the launcher raises, and how long after the fault."""
    monkeypatch.setenv("GOWIDE_COLLECTIVE_TIMEOUT_S", str(COLLECTIVE_TIMEOUT_S))
    recipe = load_recipe(write_job(tmp_path, chain(data)))
    prepared = prepare(recipe, tmp_path / "runs", num_processes=2)
    moment = tmp_path / "moment"

    def run(fault, *keys, num_processes=2):
        with pytest.raises((UserError, InternalError)) as caught:
            torchrun("tests.faults", [fault, str(moment), str(prepared.run.path), *keys], num_processes)
        return caught.value, time.time() - moment.stat().st_mtime

    run.prepared = prepared
    return run


@pytest.mark.parametrize(
    ("fault", "line", "num_processes"),
    [
        ("data", "train.beton: image 7 is damaged; encode it again", 2),
        ("data", "train.beton: image 7 is damaged; encode it again", 4),
        ("damaged", "train.beton: its index is damaged; encode it again", 2),
        ("memory", "teacher/wide: out of memory; wide needs about", 2),
        ("disk at a save", "disk full or quota exceeded; free space", 2),
        ("disk at a save", "disk full or quota exceeded; free space", 4),
        ("disk at the finish", "disk full or quota exceeded; free space", 2),
        ("not finite", "teacher/wide: the loss is not finite at step", 2),
        ("weights", "model.safetensors: Permission denied; change its permissions", 2),
    ],
)
def test_what_the_user_can_fix_is_one_line(fail, fault, line, num_processes):
    keys = ["teacher/wide", "imitate/thin"] if fault == "weights" else ["teacher/wide"]
    error, seconds = fail(fault, *keys, num_processes=num_processes)
    assert isinstance(error, UserError)
    assert line in str(error)
    assert seconds < LIMIT_S


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("crash", "process 1 ended with exit code 1; see its error above"),
        ("SIGKILL", "process 1 was killed by SIGKILL, usually out of memory"),
        ("SIGBUS", "process 1 was killed by SIGBUS, usually because shared memory or a disk is full"),
        ("SIGILL", "process 1 was killed by SIGILL, usually because the CPU is older"),
    ],
)
def test_what_kills_a_process_is_named(fail, capfd, fault, line):
    error, seconds = fail(fault, "teacher/wide")
    assert isinstance(error, WorkerError)
    assert line in str(error)
    assert seconds < LIMIT_S
    printed = capfd.readouterr().err
    assert ("a mistake of ours" in printed) == (fault == "crash")
    assert "Connection closed by peer" not in printed


def test_a_process_that_stands_still_ends_the_others_at_the_collective_timeout(fail):
    error, seconds = fail("SIGSTOP", "teacher/wide")
    assert isinstance(error, WorkerError)
    assert seconds < COLLECTIVE_TIMEOUT_S + LIMIT_S


def test_a_lock_that_another_process_holds(fail, monkeypatch):
    monkeypatch.setenv("GOWIDE_LOCK_WAIT_S", "2")
    stage_dir = fail.prepared.run.stage("teacher/wide")
    with stage_dir.lock():
        error, seconds = fail("lock", "teacher/wide")
    assert isinstance(error, UserError)
    assert "is training teacher/wide there; wait for it or end it" in str(error)
    assert seconds < LIMIT_S + 10  # to start
