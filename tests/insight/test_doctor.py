import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from numba.core.caching import CacheImpl

from gowide_dist.data.loader import Loader
from gowide_dist.errors import UserError
from gowide_dist.insight import doctor
from gowide_dist.insight.doctor import BAD, GOOD, WARNING
from tests.command import gowide


def examine(check):
    return doctor.examine("name", check, "fix")


def test_this_machine(tmp_path):
    result = gowide("doctor", "--json", "--runs", tmp_path / "runs")
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert list(findings) == [
        "python", "packages", "cpus", "import", "opencv", "cache", "ffcv", "jpeg", "gpus", "slurm", "runs",
    ]  # fmt: skip
    assert result.returncode == (1 if any(finding["state"] == BAD for finding in findings.values()) else 0)
    for name in ("python", "packages", "import", "opencv", "cache", "ffcv", "jpeg", "gpus"):
        assert findings[name]["state"] == GOOD, findings[name]
    assert findings["ffcv"]["text"] == "raw images are encoded, and read back as Pillow reads them"
    assert findings["jpeg"]["text"] == "JPEG images are encoded, and read back as Pillow reads them"
    assert result.stderr == ""
    assert all(finding["fix"] for finding in findings.values() if finding["state"] != GOOD)
    assert not list(tmp_path.iterdir())


def test_a_process_that_hangs_ends():
    """With where it hangs, though it may hang in C."""
    code = """
import sys, time
from gowide_dist.insight import doctor
doctor.LIMIT_S, doctor.sum_over_processes = 0.2, lambda: time.sleep(600)
sys.argv = ["doctor", "sum"]
doctor.main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1
    assert "Timeout (0:00:00.2" in result.stderr


def test_a_process_that_crashes(monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # its Python finds no library
    finding = examine(lambda: doctor.check_images("JPEG"))
    assert (finding.state, finding.text) == (BAD, "torchrun ended with exit code 1; see its error above")


@pytest.mark.parametrize("kind", ["raw", "JPEG"])
def test_other_pixels_than_pillows(monkeypatch, kind):
    def brighter(loader):
        for batch in batches(loader):
            yield batch._replace(images=batch.images + 5)

    batches = Loader.batches
    monkeypatch.setattr(Loader, "batches", brighter)
    with pytest.raises(UserError, match=rf"{kind} images are read back [4-6]\.\d\d of 255 from Pillow's pixels"):
        doctor.compare_with_pillow(kind)


def test_gpus_are_checked_with_a_process_each(monkeypatch):
    """Two processes, which sum over gloo, on a machine that seems to have two GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(doctor, "num_gpus", lambda: 2)
    assert doctor.check_gpus() == "2, a process on each, and NCCL sums over all of them"


def test_a_sum_that_is_wrong(monkeypatch):
    monkeypatch.setattr("gowide_dist.world.World.sum", lambda world, values: values + 1)
    with pytest.raises(UserError, match="the sum over 1 processes is wrong"):
        doctor.sum_over_processes()


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "98")
    finding = examine(doctor.check_gpus)
    assert finding.state == BAD
    assert "1 GPUs are expected on this node" in finding.text


def test_versions_of_packages(monkeypatch):
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["pydantic>=999", "no-such-package>=1", 'onnx>99; extra == "x"']
    )
    finding = examine(doctor.check_packages)
    assert finding.state == BAD
    assert finding.text.startswith("missing or too old: pydantic>=999 (2")
    assert finding.text.endswith(", no-such-package>=1 (absent)")


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    finding = examine(doctor.check_cpus)
    assert finding.state == WARNING
    assert finding.text.endswith("x 1000 threads, more than there are cores")


def test_no_place_for_compiled_code(monkeypatch):
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    finding = examine(doctor.check_cache)
    assert (finding.state, finding.text[:28]) == (WARNING, "compiled code cannot be kept")


def test_folders_for_runs(tmp_path):
    assert "written and locked" in doctor.check_runs(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="/proc/self: cannot be written"):
        doctor.check_runs(Path("/proc/self"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        doctor.check_runs(tmp_path / "file")


@pytest.mark.parametrize(("free_gb", "state"), [(0.5, BAD), (5, WARNING), (50, GOOD)])
def test_disk_space(tmp_path, monkeypatch, free_gb, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * 1e9))
    assert examine(lambda: doctor.check_runs(tmp_path)).state == state


@pytest.mark.parametrize(
    ("fails", "is_needed", "state", "text"),
    [
        (None, False, GOOD, "slurm 25.05; the controller and accounting answer"),
        ("squeue", True, BAD, "squeue: no controller"),
        ("squeue", False, WARNING, "squeue: no controller"),
        ("sacct", True, WARNING, "slurm 25.05: accounting does not answer"),
    ],
)
def test_slurm(tmp_path, monkeypatch, fails, is_needed, state, text):
    """With stand-ins for Slurm's commands."""
    for name in ("sbatch", "squeue", "scancel", "scontrol", "sacct", "srun"):
        (tmp_path / name).write_text(
            f"#!/bin/sh\n{'echo no controller >&2; exit 1' if name == fails else 'echo slurm 25.05'}"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    finding = examine(lambda: doctor.check_slurm(is_needed))
    assert (finding.state, finding.text[: len(text)]) == (state, text)


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert doctor.check_slurm(is_needed=False).startswith("not installed")
    assert examine(lambda: doctor.check_slurm(is_needed=True)).state == BAD


def test_a_profile(tmp_path):
    profile = tmp_path / "cluster.yaml"
    profile.write_text("nodess: 2\n")
    with pytest.raises(UserError, match="did you mean 'nodes'"):
        doctor.check_profile(profile, Path("/home/runs"))
    profile.write_text("nodes: 2\n")
    assert doctor.check_profile(profile, Path("/home/runs")) == str(profile)
    with pytest.raises(UserError, match="/tmp/runs: /tmp is"):
        doctor.check_profile(profile, Path("/tmp/runs"))


def test_a_slow_file_system_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "SLOW_IMPORT_S", 0)
    finding = examine(doctor.check_import)
    assert finding.state == WARNING
    assert re.fullmatch(
        r"torch is imported in [0-9.]+ s from /\S+/torch \([a-z0-9/]+\); every process .*", finding.text
    )


def test_without_pytorch_the_rest_is_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(metadata, "requires", lambda name: ["no-such-package>=1"])
    names = [finding.check for finding in doctor.check_machine(tmp_path)]
    assert names == ["python", "packages", "cpus", "slurm", "runs"]
