"""Metrics mirrored to Weights & Biases (`pip install gowide_dist[wandb]`) while WANDB_PROJECT is set.

Everything else is W&B's own environment: WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE=offline. A stage keeps one W&B run
over all restarts. Trouble with W&B is one warning, never a reason for training to end.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gowide_dist.files import write_atomically
from gowide_dist.progress import say

FINISH_WITHIN_S = 60.0


def open_mirror(folder: Path, there: list[dict[str, Any]], kept: list[dict[str, Any]]) -> Mirror | None:
    """The mirror of the stage in `folder`, if one is asked for and can be had; one per stage, in the main process.

    there: lines of the metrics file as the process before left it. kept: those that this one continues from.
    """
    if not os.environ.get("WANDB_PROJECT"):
        return None
    try:
        return Mirror(folder, there, kept)
    except ImportError:
        say("WANDB_PROJECT is set, but wandb is not installed: pip install 'gowide_dist[wandb]'; training without it")
    except Exception as error:  # whatever W&B raises
        _warn(error)
    return None


class Mirror:
    """A W&B run. Its id, and the line up to which earlier processes may have sent, lie in the stage's wandb.json."""

    def __init__(self, folder: Path, there: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
        import wandb

        path = folder / "wandb.json"
        if path.exists():
            about = json.loads(path.read_text())
            self._sent = max([tuple(about["sent"]), *map(_position, there)])
            missed = []
        else:
            about, self._sent, missed = {"id": uuid.uuid4().hex}, (0, False), kept
        write_atomically(path, json.dumps({"id": about["id"], "sent": self._sent}) + "\n")
        stage, run = "/".join(folder.parts[-2:]), folder.absolute().parents[2].name
        self._run: Any = wandb.init(
            id=about["id"],
            resume="allow",
            reinit="create_new",
            dir=folder,
            group=run,
            name=f"{run}/{stage}",
            settings=wandb.Settings(console="off", silent=True, init_timeout=30, login_timeout=30),
        )
        self._run.define_metric("*", step_metric="step")
        for line in missed:
            self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        """Send a line of the metrics file, unless a process before this one has."""
        if self._run is None or _position(line) <= self._sent:
            return
        kind = line["kind"]
        values = {f"{kind}/{name}": value for name, value in line.items() if name not in ("kind", "step")}
        self._try(lambda run: run.log({"step": line["step"], **values}))
        self._sent = _position(line)

    def close(self) -> None:
        """Wait until all is sent, but not for ever: `wandb sync` sends what is left."""
        finishing = threading.Thread(target=self._try, args=[lambda run: run.finish()], daemon=True)
        finishing.start()
        finishing.join(FINISH_WITHIN_S)
        if finishing.is_alive():
            say(f"Weights & Biases still sends after {FINISH_WITHIN_S:.0f} s: training goes on without waiting for it")

    def _try(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # whatever W&B raises
            self._run = None
            _warn(error)


def _position(line: dict[str, Any]) -> tuple[int, bool]:
    """Where a line stands in the metrics file: at one step, training comes before validation."""
    return line["step"], line["kind"] == "val"


def _warn(error: Exception) -> None:
    say(f"Weights & Biases failed ({str(error).strip()[:200]}); training goes on without it")
