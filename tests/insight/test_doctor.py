import json

import pytest

from gowide_dist.insight import doctor
from gowide_dist.insight.doctor import BAD, GOOD, WARNING
from tests.command import gowide


def test_this_machine(tmp_path):
    result = gowide("doctor", "--json", "--runs", tmp_path / "runs")
    found = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert list(found)[:7] == ["python", "packages", "cpus", "memory", "ffcv", "jpeg", "gpus"]
    assert result.returncode == (1 if any(finding["state"] == BAD for finding in found.values()) else 0)
    for name in ("python", "ffcv", "jpeg", "gpus"):
        assert found[name]["state"] == GOOD, found[name]
    assert "read back the same by us and by stock FFCV" in found["ffcv"]["text"]
    assert all(finding["mend"] for finding in found.values() if finding["state"] != GOOD)
    assert not list(tmp_path.iterdir())


def test_what_hangs_or_crashes_is_bad(monkeypatch):
    hung = doctor.in_child("ffcv", limit_s=0.05)
    assert (hung.state, hung.text) == (BAD, "hung: nothing within 0.05 s")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # the child's Python finds no library
    crashed = doctor.in_child("jpeg")
    assert crashed.state == BAD
    assert crashed.text.startswith("failed: ")
    assert "libturbojpeg" in crashed.mend


def test_other_versions(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\npydantic==0.0.1\nnot-installed==3\n")
    found = doctor.check_packages(pins)
    assert found.state == WARNING
    assert "pydantic" in found.text and "instead of 0.0.1" in found.text and "not-installed" not in found.text
    assert doctor.check_packages(tmp_path / "none").state == GOOD


def test_places_for_runs(tmp_path):
    assert doctor.check_folder_of_runs(tmp_path / "a" / "b", None, has_slurm=False).state == GOOD
    refused = doctor.check_folder_of_runs(doctor.Path("/proc/self"), None, has_slurm=False)
    assert refused.state == BAD
    (tmp_path / "file").write_text("")
    assert doctor.check_folder_of_runs(tmp_path / "file", None, has_slurm=False).state == BAD
    here = doctor.check_folder_of_runs(doctor.Path("/tmp/runs"), doctor.Profile(), has_slurm=True)
    assert (here.state, "each node's own" in here.text) == (BAD, True)


@pytest.mark.parametrize(("text", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)])
def test_quota(tmp_path, text, quota):
    (tmp_path / "cpu.max").write_text(text)
    assert doctor._cpu_quota(tmp_path / "cpu.max") == quota


def test_a_bad_profile(tmp_path):
    (tmp_path / "cluster.yaml").write_text("nodess: 2\n")
    _, found = doctor._read_profile(tmp_path / "cluster.yaml")
    assert found.state == BAD
    assert "did you mean 'nodes'?" in found.text
