"""The whole training state on disk: written atomically, verified when read, the newest few kept.

`step-000000123.pt` holds the state. `step-000000123.json` beside it is written last and describes it. A state without
a description, or with another digest than described, was cut off while it was written and is passed over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gowide_dist.files import HashingFile, atomic, sha256, write_atomically

FORMAT = 2  # of the state: raised when its keys or their meaning change
log = logging.getLogger(__name__)


def snapshot(state: Any) -> Any:
    """A copy of dictionaries, lists and tuples of tensors, on the CPU: further training does not change it."""
    match state:
        case Tensor():
            return state.detach().to("cpu", copy=True)
        case dict():
            return {name: snapshot(value) for name, value in state.items()}
        case list() | tuple():
            return type(state)(snapshot(value) for value in state)
    return state


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], *, step: int, metadata: Mapping[str, Any], keep: int
) -> None:
    """Write the state after `step` steps, then delete all but the `keep` newest whole states up to this one.

    metadata: goes into the description, and holds the `fingerprint` of the training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.pt"
    with atomic(path) as file:
        hashing = HashingFile(file)  # the state is never in memory a second time
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:  # of torch's zip writer, also where the disk is full
            raise hashing.failure or error from error
        description = {"format": FORMAT, "step": step, **metadata, "sha256": hashing.sync()}
    write_atomically(path.with_suffix(".json"), json.dumps(description, indent=2) + "\n")
    states = sorted(folder.glob("step-*.pt"))
    kept = [state for state in states if state <= path and state.with_suffix(".json").exists()][-keep:]
    for old in set(states) - set(kept):
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink()


def whole_checkpoints(folder: Path, fingerprint: str) -> list[int]:
    """The steps with an undamaged state of the training with this fingerprint, oldest first."""
    whole = []
    states = sorted(folder.glob("step-*.pt"))
    for path in states:
        try:
            description = json.loads(path.with_suffix(".json").read_text())
            if description.get("format") != FORMAT:
                log.warning("%s: written by another version of gowide_dist, skipped", path)
            elif description["fingerprint"] != fingerprint:
                log.warning("%s: of another recipe, skipped", path)
            elif sha256(path) != description["sha256"]:
                log.warning("%s: damaged, skipped", path)
            else:
                whole.append(int(description["step"]))
        except (OSError, ValueError, KeyError):
            log.warning("%s: incomplete, skipped", path)
    if states and not whole:
        log.warning("%s: no state is left to continue from: the training begins at step 0", folder)
    return whole


def load_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """The state after `step` steps, on the CPU."""
    state: dict[str, Any] = torch.load(folder / f"step-{step:09d}.pt", map_location="cpu", weights_only=True)
    return state
