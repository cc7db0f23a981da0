import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from gowide_dist.insight import doctor
from gowide_dist.insight.doctor import BAD, GOOD, WARNING, CheckError
from tests.command import gowide


def test_this_machine(tmp_path):
    result = gowide("doctor", "--json", "--runs", tmp_path / "runs")
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert list(findings) == ["python", "packages", "cpus", "ffcv", "jpeg", "gpus", "slurm", "runs"]
    assert result.returncode == (1 if any(finding["state"] == BAD for finding in findings.values()) else 0)
    for name in ("python", "ffcv", "jpeg", "gpus"):
        assert findings[name]["state"] == GOOD, findings[name]
    assert "read back the same by us and by stock FFCV" in findings["ffcv"]["text"]
    assert all(finding["mend"] for finding in findings.values() if finding["state"] != GOOD)
    assert not list(tmp_path.iterdir())


def test_a_child_that_hangs_is_bad():
    hung = doctor.in_child("ffcv", "jpeg", limit_s=0.05)
    assert [finding.check for finding in hung] == ["ffcv", "jpeg"]
    assert {(finding.state, finding.text) for finding in hung} == {(BAD, "hung: no result within 0.05 s")}


def test_a_hung_child_ends_with_its_own_children(tmp_path, monkeypatch):
    """Processes on GPUs would otherwise wait in a collective for ever, and hold the child's pipes open."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/pid\nwait\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    start = time.monotonic()
    (finding,) = doctor.in_child("gpus", limit_s=2)
    assert finding.text == "hung: no result within 2 s"
    assert time.monotonic() - start < 60
    grandchild = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    assert not grandchild.exists() or grandchild.read_text().split()[2] == "Z"


def test_a_child_that_crashes_is_bad(monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # the child's Python finds no library
    ffcv, jpeg = doctor.in_child("ffcv", "jpeg")
    assert (ffcv.check, jpeg.check, ffcv.state, jpeg.state) == ("ffcv", "jpeg", BAD, BAD)
    assert ffcv.text.startswith("failed: ")
    assert "libturbojpeg" in jpeg.mend


def test_all_reduce_over_processes():
    doctor.all_reduce("gloo", 2)


def test_an_all_reduce_that_fails():
    with pytest.raises(ProcessRaisedException, match="no-such-backend"):
        doctor.all_reduce("no-such-backend", 1)


def test_gpus_are_checked_with_a_process_each(monkeypatch):
    """With stand-ins for torch's view of two GPUs."""
    groups = []
    monkeypatch.setattr(doctor, "all_reduce", lambda *group: groups.append(group))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A100")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 1))
    assert doctor.check_gpus() == "2: A100; NCCL 2.28.1 sums over all of them"
    assert groups == [("nccl", 2)]


def test_a_driver_without_a_gpu_for_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "num_gpus", lambda: 8)
    with pytest.raises(CheckError, match="torch sees no GPU"):
        doctor.check_gpus()


def test_other_versions(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\npydantic==0.0.1\nnot-installed==3\n")
    finding = doctor.examine("packages", lambda: doctor.check_packages(pins))
    assert finding.state == WARNING
    assert "pydantic" in finding.text and "instead of 0.0.1" in finding.text and "not-installed" not in finding.text
    assert "all installed" in doctor.check_packages(tmp_path / "none")


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    finding = doctor.examine("cpus", doctor.check_cpus)
    assert (finding.state, finding.mend) == (WARNING, "unset OMP_NUM_THREADS")


def test_folders_for_runs(tmp_path):
    assert "written and locked" in doctor.check_runs(tmp_path / "a" / "b")
    with pytest.raises(CheckError, match="/proc/self: cannot be written"):
        doctor.check_runs(Path("/proc/self"))
    (tmp_path / "file").touch()
    with pytest.raises(CheckError, match="Not a directory"):
        doctor.check_runs(tmp_path / "file")


@pytest.mark.parametrize(("free_gb", "state"), [(0.5, BAD), (5, WARNING), (50, GOOD)])
def test_disk_space(tmp_path, monkeypatch, free_gb, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * 1e9))
    assert doctor.examine("runs", lambda: doctor.check_runs(tmp_path)).state == state


def test_a_profile(tmp_path):
    profile = tmp_path / "cluster.yaml"
    profile.write_text("nodess: 2\n")
    with pytest.raises(CheckError, match="did you mean 'nodes'"):
        doctor.check_profile(profile, Path("/home/runs"))
    profile.write_text("nodes: 2\n")
    assert doctor.check_profile(profile, Path("/home/runs")) == str(profile)
    with pytest.raises(CheckError, match="/tmp/runs: /tmp is"):
        doctor.check_profile(profile, Path("/tmp/runs"))
