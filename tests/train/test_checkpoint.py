"""Training states on disk."""

import torch

from gowide_dist.train.checkpoint import load_checkpoint, save_checkpoint, whole_checkpoints


def save(folder, step, keep=2, fingerprint="mine"):
    save_checkpoint(folder, {"x": torch.tensor(step)}, step=step, about={"fingerprint": fingerprint}, keep=keep)


def test_the_newest_few_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert whole_checkpoints(tmp_path, "mine") == [2, 3]
    assert int(load_checkpoint(tmp_path, 3)["x"]) == 3


def test_those_of_another_training_are_passed_over(tmp_path, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2, fingerprint="another")
    assert whole_checkpoints(tmp_path, "mine") == [1]
    assert "of another recipe, passed over" in caplog.text


def test_what_was_cut_off_ahead_never_displaces_a_whole_one(tmp_path):
    """A state without its description, of a step that is still to come: killed between the two files."""
    save(tmp_path, 1, keep=1)
    (tmp_path / "step-000000009.pt").write_bytes(b"cut off")
    save(tmp_path, 2, keep=1)
    assert whole_checkpoints(tmp_path, "mine") == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002.json", "step-000000002.pt"]
