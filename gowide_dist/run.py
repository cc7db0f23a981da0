"""The run directory: its layout, its ownership by fingerprints, its locks. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gowide_dist.environment import describe_environment
from gowide_dist.errors import RunError, number_from
from gowide_dist.files import flock, sha256, temporary_name, write_atomically, writing_to
from gowide_dist.identity import fingerprint, recipe_identity
from gowide_dist.networks.foreign import NETWORKS
from gowide_dist.progress import say
from gowide_dist.recipe import Recipe, load_recipe, load_seeds, run_of_seed
from gowide_dist.schema import nearest, read_yaml

LOCK_WAIT_S = 150  # a file server frees a dead node's locks late


class Done(BaseModel):
    """The content of `done.json`, which is written when a stage instance is finished."""

    stage: str
    network: str
    fingerprint: str
    parents: dict[str, str]  # key -> fingerprint
    model_sha256: str
    top1: float  # %, of all validation images
    top5: float
    balanced_top1: float | None = None  # mean of the classes' top-1; None in files from before it was noted
    epochs: int
    steps: int
    images: int  # trained on
    stream: str  # digest of the samples of every step: equal for any number of processes and restarts
    seconds: float  # over all restarts; divided equally among students that trained together
    world_size: int


def top5_is_telling(num_classes: int) -> bool:
    """Whether a label may be missing from the five best: top-5 of fewer classes is always 100 %."""
    return num_classes > 5


@dataclass(frozen=True)
class StageDir:
    """The folder of one stage instance, `stages/<stage>/<network>`: `key` is `stage/network`."""

    path: Path
    key: str

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def saved_step(self) -> int | None:
        """The step of the newest checkpoint, by its description's name."""
        return max(
            (int(path.stem.removeprefix("step-")) for path in self.checkpoints.glob("step-*.json")), default=None
        )

    @property
    def metrics(self) -> Path:
        """A JSON line per log interval and per evaluation; see `read_metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @cached_property
    def done(self) -> Done | None:
        """None while the stage is unfinished. Raises RunError if the file is damaged."""
        path = self.path / "done.json"
        try:
            return Done.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise RunError(f"{path}: damaged; delete {self.path} to train the stage again") from error

    def is_done(self, fingerprint: str) -> bool:
        return self.done is not None and self.done.fingerprint == fingerprint and self.model.is_file()

    def check_weights(self) -> None:
        """Raises RunError unless the finished weights are there as they were trained."""
        with suppress(OSError):
            if self.done and sha256(self.model) == self.done.model_sha256:
                return
        raise RunError(
            f"{self.model}: weights missing or changed since training; delete {self.path} to train {self.key} again"
        )

    def read_identity(self) -> dict[str, Any] | None:
        """The identity of the training that has claimed the folder, if any. Raises RunError if the file is damaged."""
        path = self.path / "identity.json"
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path}: damaged; delete {self.path} to train {self.key} again") from error

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raises RunError, naming what differs, if a training of another identity has claimed the folder."""
        claimed = self.read_identity()
        if claimed is None or fingerprint(claimed) == fingerprint(identity):
            return
        was, now = flat(claimed), flat(identity)
        differing = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        texts = [self._difference(key, was.get(key), now.get(key)) for key in differing[:4]]
        raise RunError(
            f"{self.path}: holds {self.key} of another recipe ({'; '.join(texts)}); take another name, or --fresh to "
            "train it again"
        )

    def _difference(self, key: str, was: str | None, now: str | None) -> str:
        """How two identities differ in one of their keys, in the recipe's words. None: the default."""
        stage, _, network = self.key.partition("/")
        if key == "format":
            return f"it was trained by another version of gowide_dist, whose format is {was}, not {now}"
        if key == "network.networks.py":
            return "--networks: the file is another"
        if key in ("data.train", "data.val"):
            return f"{key}: the file is another"
        if key in ("init", "init.file", "teacher"):
            return f"stages.{stage}.{key}: the weights are others: of another file or network, or trained otherwise"
        room, _, rest = key.partition(".")
        path = {
            "stage": f"stages.{stage}.{rest}",
            "init": f"stages.{stage}.{key}",
            "network": f"networks.{network}.{rest}",
        }.get(room, key)
        return f"{path} was {was or 'its default'}, is {now or 'its default'}"

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the folder, whose lock the caller has, this training's. Raises RunError if it is another identity's."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.check_identity(identity)
        for unfinished in (*self.path.glob(temporary_name("*")), *self.checkpoints.glob(temporary_name("*"))):
            unfinished.unlink(missing_ok=True)  # a killed writer's
        write_atomically(self.path / "identity.json", json.dumps(identity, indent=2) + "\n")

    def finish(self, done: Done) -> None:
        """Mark the stage as finished: written after everything else."""
        write_atomically(self.path / "done.json", done.model_dump_json(indent=2) + "\n")

    def clear(self) -> None:
        """Delete what was trained, in an order such that a kill leaves nothing that another training would use."""
        if not self.path.exists():
            return
        with self.lock():
            order = {"done.json": 0, "identity.json": 2}  # everything else in between
            for path in sorted(self.path.iterdir(), key=lambda path: order.get(path.name, 1)):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        self.__dict__.pop("done", None)

    def writer(self) -> str | None:
        """The process and host that train the stage now, if any. Raises RunError where that cannot be told."""
        try:
            with (self.path / "lock").open() as file:
                return None if flock(file, fcntl.LOCK_SH) else file.read().strip() or "another process"
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"{self.path}/lock: cannot be read ({error.strerror})") from error

    def check_unlocked(self) -> None:
        """Raises RunError, naming the writer, if there is one."""
        if writer := self.writer():
            raise RunError(f"{self.path}: {writer} is training {self.key} there; wait for it or end it")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer. Raises RunError if another one keeps the lock for GOWIDE_LOCK_WAIT_S."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            deadline = time.monotonic() + number_from("GOWIDE_LOCK_WAIT_S", LOCK_WAIT_S)
            while not flock(file, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    self.check_unlocked()
                time.sleep(1)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            yield


def load_jobs(
    job: Path, overrides: Sequence[str], networks: Path | None, runs: Path, seeds: Sequence[int] = ()
) -> list[Recipe]:
    """The recipes of a command, one for each seed. Without `networks` the copy in a run of theirs serves, as the same
    command continues a run.

    Raises RecipeError as `load_recipe` does.
    """
    if networks is None:
        name = read_yaml(job, overrides).get("name")
        copies = [Run(runs / each).networks for each in (f"{name}", *(f"{name}-{seed}" for seed in seeds))]
        return load_seeds(job, overrides, seeds, next((copy for copy in copies if copy.is_file()), None))
    recipes = load_seeds(job, overrides, seeds, networks)
    if recipes[0].code is None:
        say(f"note: --networks {networks} has no effect: no network of {job} is `own`")
    return recipes


@dataclass(frozen=True)
class Run:
    """A run directory, `runs/<name>`."""

    path: Path

    def stage(self, key: str) -> StageDir:
        return StageDir(self.path / "stages" / key, key)

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    def recipe(self) -> Recipe:
        """The recipe that the run was written for. Raises RunError if this is no run, RecipeError if it is damaged."""
        if not self.recipe_path.exists():
            inside = sorted(self.path.glob(f"*/{self.recipe_path.name}"))[:3]
            runs = f"; runs in it: {', '.join(str(path.parent) for path in inside)}" if inside else ""
            raise RunError(f"{self.path}: not a run directory: it has no {self.recipe_path.name}{runs}")
        return load_recipe(self.recipe_path, networks=self.networks if self.networks.exists() else None)

    @property
    def networks(self) -> Path:
        """The file of the user's own networks, where the recipe has some."""
        return self.path / NETWORKS

    @property
    def teacher_logits(self) -> Path:
        """Folder of stored logits, beside the runs, which share them."""
        return self.path.parent / "teacher_logits"

    @property
    def slurm(self) -> Path:
        """Folder of the Slurm jobs' ids, scripts and logs."""
        return self.path / "slurm"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def finished(self, recipe: Recipe) -> dict[str, Done]:
        """The finished instances whose claimed identity is the recipe's, but for the checksums of the data's files.

        So it needs no data. Parents first, and only with their parents. Raises RunError if a file is damaged.
        """
        finished: dict[str, Done] = {}
        for key, instance in recipe.instances.items():
            stage_dir = self.stage(key)
            if (done := stage_dir.done) is None or (claimed := stage_dir.read_identity()) is None:
                continue
            own = recipe_identity(instance, recipe)
            checksums = {name: claimed.get("data", {}).get(name) for name in ("train", "val")}
            expected = {**claimed, **own, "data": {**checksums, **own["data"]}}
            parents = {finished[parent].fingerprint if parent in finished else None for parent in instance.parents}
            if fingerprint(claimed) == fingerprint(expected) and parents == {*done.parents.values()}:
                finished[key] = done
        return finished

    def write_recipe(self, recipe: Recipe) -> None:
        """Create the folder, with every default written out in its recipe. Raises RunError if it cannot be written."""
        with writing_to(self.path, "--runs"):
            self.path.mkdir(parents=True, exist_ok=True)
            if recipe.code:
                write_atomically(self.networks, recipe.code.source)
            write_atomically(self.recipe_path, recipe.to_yaml())

    def write_environment(self, devices: list[str], world_size: int) -> None:
        """Record code, packages, machine and command, to explain results later."""
        environment = json.dumps(describe_environment(devices, world_size), indent=2)
        write_atomically(self.path / "environment.json", f"{environment}\n")


def runs_of_seeds(run: Run, seeds: Sequence[int]) -> list[Run]:
    """The runs of `--seeds`, beside the run of the recipe's own seed, which is absent if that is none of them.

    Without seeds that run alone.
    """
    if not seeds:
        return [run]
    own_seed = run.recipe().seed if run.recipe_path.exists() else None
    return [Run(run.path.with_name(run_of_seed(run.path.name, own_seed, seed))) for seed in seeds]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none if it is absent. Damaged lines, as a kill leaves them, are left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            if isinstance(line := json.loads(text), dict) and {"kind", "step"} <= line.keys():
                lines.append(line)
    return lines


def key_of(name: str, keys: Collection[str], run: Path) -> str:
    """The one of `keys` that is named by `stage` or `stage/network`. Raises RunError if it is none or several."""
    named = [key for key in keys if name in (key, key.partition("/")[0])]
    if len(named) == 1:
        return named[0]
    stages = [key.partition("/")[0] for key in keys]
    hint = f"name one of {', '.join(named)}" if named else nearest(name, keys if "/" in name else dict.fromkeys(stages))
    raise RunError(f"{run}: {name} is {'several networks' if named else 'not there'}; {hint}")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Values as JSON text, by dotted key."""
    texts: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            texts |= flat(value, f"{prefix}{key}.")
        else:
            texts[f"{prefix}{key}"] = json.dumps(value)
    return texts
