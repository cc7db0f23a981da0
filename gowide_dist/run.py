"""The run directory: what is there, whose it is, who writes it. Nothing here imports torch."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gowide_dist.errors import RunError
from gowide_dist.files import flock, sha256, write_atomically
from gowide_dist.identity import fingerprint, recipe_identity
from gowide_dist.recipe import Recipe

LOCK_WAIT_S = 150  # a file server frees a dead node's locks only after a while
_PACKAGES = ("torch", "torchvision", "ffcv", "numpy", "numba", "submitit", "pydantic", "safetensors")


class Done(BaseModel):
    """What `done.json` says of a finished stage instance."""

    stage: str
    network: str
    fingerprint: str
    parents: dict[str, str]  # key -> fingerprint
    model_sha256: str
    top1: float  # %, of all validation images
    top5: float
    epochs: int
    steps: int
    images: int  # trained on
    stream: str  # digest of which samples were seen at which step: equal for any number of processes and restarts
    seconds: float  # over all restarts; of students that trained together, each has an equal share
    world_size: int


@dataclass(frozen=True)
class StageDir:
    """The folder of one stage instance."""

    path: Path
    key: str

    @property
    def checkpoints(self) -> Path:
        """Folder of the training states."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """A JSON line per log interval and per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The finished weights."""
        return self.path / "model.safetensors"

    @cached_property
    def done(self) -> Done | None:
        """What the finished stage says of itself, if it is finished. Raises RunError if that is damaged."""
        path = self.path / "done.json"
        try:
            return Done.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise RunError(f"{path}: damaged; delete {self.path} to train the stage again") from error

    def is_done(self, fingerprint: str) -> bool:
        """Whether the stage with this fingerprint is finished here."""
        return self.done is not None and self.done.fingerprint == fingerprint and self.model.is_file()

    def check_weights(self) -> None:
        """Raises RunError unless the finished weights are there as they were trained."""
        try:
            if self.done and sha256(self.model) == self.done.model_sha256:
                return
        except OSError:
            pass
        raise RunError(f"{self.path}: not the weights that were trained; delete it to train {self.key} again")

    def read_identity(self) -> dict[str, Any] | None:
        """The identity of the training that claimed the folder, if one has. Raises RunError if it is damaged."""
        path = self.path / "identity.json"
        try:
            identity: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: damaged; --fresh trains {self.key} again") from error
        return identity

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raises RunError, naming what differs, if the folder holds another training than this."""
        claimed = self.read_identity()
        if claimed is None or fingerprint(claimed) == fingerprint(identity):
            return
        there, here = flat(claimed), flat(identity)
        differs = [
            f"{key} is {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
            for key in {**there, **here}
            if there.get(key) != here.get(key)
        ]
        raise RunError(
            f"{self.path}: holds {self.key} of another recipe ({'; '.join(differs[:4])}); "
            "take another name, or --fresh to train it again"
        )

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the folder this training's own."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.check_identity(identity)
        write_atomically(self.path / "identity.json", json.dumps(identity, indent=2) + "\n")

    def finish(self, done: Done) -> None:
        """Mark the stage as finished: the last thing that is written."""
        write_atomically(self.path / "done.json", done.model_dump_json(indent=2) + "\n")

    def forget(self) -> None:
        """Delete what was trained here. Cut off anywhere, it leaves nothing that could be taken for this training's."""
        if not self.path.exists():
            return
        with self.lock():
            order = {"done.json": 0, "lock": 2, "identity.json": 3}  # all else between
            for path in sorted(self.path.iterdir(), key=lambda path: order.get(path.name, 1)):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        self.__dict__.pop("done", None)

    def writer(self) -> str | None:
        """Who is training here now: process and host. Raises RunError where that cannot be told."""
        try:
            with (self.path / "lock").open() as file:
                return None if flock(file, fcntl.LOCK_SH) else file.read().strip() or "another process"
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"{self.path}/lock: cannot be read ({error.strerror})") from error

    def check_unlocked(self) -> None:
        """Raises RunError, naming the writer, if there is one now."""
        if writer := self.writer():
            raise self._taken(writer)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer. Raises RunError, naming the other, if there is one and it stays."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            deadline = time.monotonic() + LOCK_WAIT_S
            while not flock(file, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise self._taken(file.read().strip() or "another process")
                time.sleep(1)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield

    def _taken(self, writer: str) -> RunError:
        return RunError(f"{self.path}: {writer} is training {self.key} there; wait for it or end it")


@dataclass(frozen=True)
class Run:
    """A run directory, `runs/<name>`."""

    path: Path

    def stage(self, key: str) -> StageDir:
        """The folder of instance `key` (`stage/network`)."""
        return StageDir(self.path / "stages" / key, key)

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def teacher_logits(self) -> Path:
        """Folder of the logits that teachers have given, which all runs beside this one share."""
        return self.path.parent / "teacher_logits"

    @property
    def slurm(self) -> Path:
        """Folder of the run's Slurm jobs: their ids, scripts and logs."""
        return self.path / "slurm"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    def finished(self, recipe: Recipe) -> dict[str, Done]:
        """What is done of a recipe, by instance, parents first; without what another recipe has left there.

        Needs no data. Raises RunError if something is damaged.
        """
        found: dict[str, Done] = {}
        for key, instance in recipe.instances.items():
            place = self.stage(key)
            identity = place.read_identity() if place.done else None
            if place.done is None or identity is None:
                continue
            data = {name: value for name, value in identity.get("data", {}).items() if name not in ("train", "val")}
            own = recipe_identity(instance, recipe)
            there = {name: identity.get(name) for name in own} | {"data": data}
            parents = [found[parent].fingerprint if parent in found else None for parent in instance.parents]
            if fingerprint(there) == fingerprint(own) and set(parents) == set(place.done.parents.values()):
                found[key] = place.done
        return found

    def write_recipe(self, recipe: Recipe) -> None:
        """Create the folder, with the recipe resolved. Raises RunError if it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.recipe_path, recipe.to_yaml())
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); choose another place with --runs"
            ) from error

    def write_environment(self, devices: list[str], world_size: int) -> None:
        """Record what runs where, for whoever must explain the numbers later."""
        environment = {
            **code_version(),
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in _PACKAGES},
            "host": platform.node(),
            "platform": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)),
            "devices": devices,
            "world_size": world_size,
            "command": sys.argv,
        }
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")


def code_version() -> dict[str, Any]:
    """The version of this package, its git commit and whether the files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        if not shutil.which("git"):
            return None
        result = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".")
    return {
        "gowide_dist": metadata.version("gowide_dist"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none if it is not there. What is damaged, or cut off by a kill, is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"kind", "step"} <= line.keys():
                lines.append(line)
    return lines


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted paths to values, as text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value)
    return found
