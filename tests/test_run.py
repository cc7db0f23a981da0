"""The run directory: identities, locks, and what belongs to the recipe."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gowide_dist import load_recipe
from gowide_dist.errors import RunError, fixable
from gowide_dist.identity import fingerprint
from gowide_dist.insight.report import report
from gowide_dist.insight.status import status
from gowide_dist.pipeline import find_finished
from gowide_dist.prepare import check_run, write_run
from gowide_dist.run import StageDir
from gowide_dist.train.checkpoint import save_checkpoint
from tests.command import GOWIDE, LIMIT_S
from tests.fashion import chain, encode_part, train, write_job


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return encode_part(tmp_path_factory.mktemp("fashion"), 240, 100)


def test_every_difference_is_refused(tmp_path):
    stage_dir = StageDir(tmp_path / "a", "a/thin")
    stage_dir.claim({"stage": {"epochs": 2}, "data": {}})
    stage_dir.claim({"data": {}, "stage": {"epochs": 2}})
    for other, difference in [
        ({"stage": {"epochs": 3}, "data": {}}, "stages.a.epochs was 2, is 3"),
        ({"stage": {"epochs": 2}, "data": {"crop": {}}}, r"data.crop was its default, is \{\}"),
    ]:
        with pytest.raises(RunError, match=difference):
            stage_dir.claim(other)


def test_results_of_another_recipe_are_not_shown(data, tmp_path):
    """After its teacher was trained anew, a student of the old one is neither shown nor loaded."""
    recipe = chain(data, log_every_steps=1)
    run = train(tmp_path, recipe, "distill")
    assert [row.state for row in status(run)] == ["done", "done", "done", "absent"]
    done = run.stage("teacher/wide").done.fingerprint
    command = [GOWIDE, "run", str(write_job(tmp_path, recipe)), "--runs", str(tmp_path), "seed=1", "--nproc", "1"]
    subprocess.run([*command, "--only", "teacher", "--fresh"], check=True, stdout=subprocess.DEVNULL)
    assert run.stage("teacher/wide").done.fingerprint != done
    rows = status(run)
    assert [row.state for row in rows] == ["done", "absent", "absent", "absent"]
    assert rows[2].note == "its folder holds a result of another recipe or of other data"
    assert "1 of 4 stages done" in report([run], measure=False)[0]
    with pytest.raises(RunError, match="distill/thin is finished, but not by this recipe"):
        find_finished(run, "distill")


def test_nothing_of_a_cleared_folder_is_used(data, tmp_path):
    """Checkpoints that a killed --fresh has left belong to another training."""
    recipe = chain(data)
    run = train(tmp_path, recipe, "teacher")
    stage_dir = run.stage("teacher/wide")
    save_checkpoint(stage_dir.checkpoints, {}, step=3, metadata={"fingerprint": "of another"}, keep=1)
    (stage_dir.path / "done.json").unlink()
    (stage_dir.path / "identity.json").unlink()
    again = train(tmp_path, recipe, "teacher").stage("teacher/wide").done
    assert again.fingerprint == fingerprint(stage_dir.read_identity())
    stage_dir.clear()
    assert [path.name for path in stage_dir.path.iterdir()] == ["lock"]
    assert stage_dir.done is None


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def flock(file, kind):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    stage_dir = StageDir(tmp_path / "a", "a/thin")
    with pytest.raises(RunError, match=r"lock: cannot be locked \(.*choose a file system with locks"), stage_dir.lock():
        pass
    with pytest.raises(RunError, match="cannot be locked"):
        stage_dir.check_unlocked()


def test_a_launcher_that_is_killed_at_once_leaves_no_worker(data, tmp_path):
    """Before the worker has even loaded PyTorch."""
    job = write_job(tmp_path, chain(data, name="orphan"))
    command = [GOWIDE, "run", str(job), "--runs", str(tmp_path), "--nproc", "1"]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def workers():
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes()
            except OSError:
                continue
            if b"gowide_dist.pipeline" in line and str(tmp_path).encode() in line:
                found.append(int(path.parent.name))
        return found

    try:
        deadline = time.monotonic() + LIMIT_S
        while not workers():
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        launcher.kill()
        launcher.wait()
        while left := workers():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert not (tmp_path / "orphan" / "stages").exists()
    finally:
        for process in [launcher.pid, *workers()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.wait()


def test_an_instance_that_a_job_trains_is_not_copied_from_a_sibling(data, tmp_path):
    train(tmp_path, chain(data), "teacher")
    prepared = check_run(load_recipe(write_job(tmp_path, chain(data, name="other"))), tmp_path, only=["teacher"])
    path = prepared.run.stage("teacher/wide").path
    write_run(prepared, in_jobs={"teacher/wide"})
    assert not path.exists()
    write_run(prepared)
    assert prepared.run.stage("teacher/wide").done is not None


def test_permissions_are_one_line():
    line = fixable(PermissionError(errno.EACCES, "Permission denied", "stages/a"))
    assert line == "stages/a: Permission denied; change its permissions, or choose another place"
    assert "disk full" in fixable(OSError(errno.ENOSPC, "No space left on device"))
    assert fixable(OSError(errno.EIO, "Input/output error", "stages/a")) is None
    assert "torch is not installed" in fixable(ModuleNotFoundError("No module named 'torch'", name="torch.nn"))
    assert fixable(ModuleNotFoundError("No module named 'gowide_dist.x'", name="gowide_dist.x")) is None
    assert fixable(ImportError("libGL.so.1: cannot open shared object file: No such file")).startswith(
        "libGL.so.1 is missing"
    )
    assert fixable(ImportError("cannot import name 'x'")) is None
