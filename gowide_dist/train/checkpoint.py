"""The whole training state on disk: written atomically, verified when read, the newest few kept.

`step-000000123.pt` holds the state. `step-000000123.json` beside it, written last, says what it is; a state without
one, or with another checksum than it says, was cut off while it was written and is passed over.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gowide_dist.files import sha256, write_atomically

log = logging.getLogger(__name__)


class Background:
    """Does one piece of writing after the other in a thread, while training goes on.

    The first that fails surfaces at the next `check`, `wait` or regular exit, and nothing is written after it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._failure: BaseException | None = None

    def __call__(self, write: Callable[[], None]) -> None:
        """Do this next. What it writes may not change meanwhile."""
        self._thread.submit(self._do, write)

    def check(self) -> None:
        """Raise what has gone wrong until now."""
        if self._failure:
            raise self._failure

    def wait(self) -> None:
        """Return when all is written. Raises what has gone wrong."""
        self._thread.submit(int).result()  # the last in the line
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.check()

    def _do(self, write: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                write()
            except BaseException as error:
                self._failure = error


def snapshot(state: Any) -> Any:
    """A copy of dictionaries, lists and tuples of tensors, on the CPU: training on does not change it."""
    match state:
        case Tensor():
            return state.detach().to("cpu", copy=True)
        case dict():
            return {name: snapshot(value) for name, value in state.items()}
        case list() | tuple():
            return type(state)(snapshot(value) for value in state)
    return state


def save_checkpoint(folder: Path, state: dict[str, Any], *, step: int, about: dict[str, Any], keep: int) -> None:
    """Write the state after `step` steps, then delete all but the `keep` newest that are whole and not ahead of it.

    about: what to say of it beside it, its `fingerprint` among that.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = folder / f"step-{step:09d}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    about = {"step": step, **about, "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    states = sorted(folder.glob("step-*.pt"))
    kept = [state for state in states if state <= path and state.with_suffix(".json").exists()][-keep:]
    for old in states:
        if old not in kept:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink()


def whole_checkpoints(folder: Path, fingerprint: str) -> list[int]:
    """The steps whose states are there, undamaged and of the training with this fingerprint, oldest first."""
    whole = []
    for path in sorted(folder.glob("step-*.pt")):
        try:
            about = json.loads(path.with_suffix(".json").read_text())
            if about["fingerprint"] != fingerprint:
                log.warning("%s: of another recipe, passed over", path)
            elif sha256(path) == about["sha256"]:
                whole.append(int(about["step"]))
            else:
                log.warning("%s: damaged, passed over", path)
        except (OSError, ValueError, KeyError):
            log.warning("%s: incomplete, passed over", path)
    return whole


def load_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """The state after `step` steps, on the CPU."""
    state: dict[str, Any] = torch.load(folder / f"step-{step:09d}.pt", map_location="cpu", weights_only=True)
    return state
