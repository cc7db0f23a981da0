"""Training states on disk."""

import json
import subprocess
import sys

import pytest
import torch

from gowide_dist.files import sha256
from gowide_dist.train.checkpoint import load_checkpoint, save_checkpoint, whole_checkpoints


def save(folder, step, keep=2, fingerprint="mine"):
    save_checkpoint(folder, {"x": torch.tensor(step)}, step=step, metadata={"fingerprint": fingerprint}, keep=keep)


def test_the_newest_few_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert whole_checkpoints(tmp_path, "mine") == [2, 3]
    assert int(load_checkpoint(tmp_path, 3)["x"]) == 3


def test_states_of_another_training_are_passed_over(tmp_path, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2, fingerprint="another")
    assert whole_checkpoints(tmp_path, "mine") == [1]
    assert "of another recipe, skipped" in caplog.text


@pytest.mark.parametrize("number", [None, 1, 99])
def test_states_of_another_version_are_passed_over(tmp_path, caplog, number):
    """Their keys are not those that this version reads; a state without a number is older than the numbers."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-000000002.json"
    description = json.loads(path.read_text()) | {"format": number}
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not None}))
    assert whole_checkpoints(tmp_path, "mine") == [1]
    assert "step-000000002.pt: written by another version of gowide_dist, skipped" in caplog.text


def test_damage_is_passed_over(tmp_path, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)
    content = bytearray((tmp_path / "step-000000002.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "step-000000002.pt").write_bytes(content)
    assert whole_checkpoints(tmp_path, "mine") == [1]
    assert "step-000000002.pt: damaged, skipped" in caplog.text
    assert "begins at step 0" not in caplog.text
    (tmp_path / "step-000000001.pt").write_bytes(content)
    assert whole_checkpoints(tmp_path, "mine") == []
    assert "no state is left to continue from: the training begins at step 0" in caplog.text


def test_a_state_cut_off_ahead_never_displaces_a_whole_one(tmp_path):
    """A state without its description, of a step that is still to come: killed between the two files."""
    save(tmp_path, 1, keep=1)
    (tmp_path / "step-000000009.pt").write_bytes(b"cut off")
    save(tmp_path, 2, keep=1)
    assert whole_checkpoints(tmp_path, "mine") == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002.json", "step-000000002.pt"]


def test_the_digest_taken_while_writing_is_that_of_the_file(tmp_path):
    state = {"tensors": [torch.randn(1000, 300), torch.arange(7)], "nested": {"a": (1, "two")}}
    save_checkpoint(tmp_path, state, step=5, metadata={}, keep=1)
    described = json.loads((tmp_path / "step-000000005.json").read_text())["sha256"]
    assert described == sha256(tmp_path / "step-000000005.pt")
    loaded = load_checkpoint(tmp_path, 5)
    assert torch.equal(loaded["tensors"][0], state["tensors"][0])
    assert loaded["nested"] == state["nested"]


SAVE_ALONE = """
import resource, sys, torch
from pathlib import Path
from gowide_dist.train.checkpoint import save_checkpoint
save_checkpoint(Path(sys.argv[1]), {"x": torch.ones(10)}, step=1, metadata={}, keep=1)  # what every save loads
state = {"x": torch.ones(50_000_000)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_checkpoint(Path(sys.argv[1]), state, step=2, metadata={}, keep=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_state_is_never_in_memory_a_second_time(tmp_path):
    """200 MB are written in at most 50 MB beside them."""
    result = subprocess.run([sys.executable, "-c", SAVE_ALONE, tmp_path], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 50_000  # KiB
