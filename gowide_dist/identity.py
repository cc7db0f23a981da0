"""The identity of a stage instance, which is all that determines its weights, and the fingerprint of that."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gowide_dist.errors import RunError
from gowide_dist.files import is_safetensors, no_weights, sha256
from gowide_dist.instances import Instance
from gowide_dist.networks.foreign import Own, Settings
from gowide_dist.recipe import Recipe

IDENTITY_FORMAT = 4  # raised when the code changes so that the same recipe gives other weights
EMA_FORMAT = 5  # of stages with a moving average, which warms up since; goes when the other one is raised


def recipe_identity(instance: Instance, recipe: Recipe) -> dict[str, Any]:
    """The part of the identity that comes from the recipe alone: seed, global batch, numerics, data, network, stage.

    Values that equal their default are left out, so that a new option with a default does not change the fingerprint of
    what is already trained. A *changed* default therefore needs another `IDENTITY_FORMAT`; a test notices it. Names of
    other stages are left out too: their fingerprints stand for them.
    """
    dump: dict[str, Any] = {"mode": "json", "exclude_defaults": True}
    return {
        "seed": instance.seed,
        "batch_size": recipe.batch_size,
        "precision": recipe.precision,
        "compile": recipe.compile,
        "sync_batch_norm": recipe.sync_batch_norm,
        "data": {
            **recipe.data.model_dump(**dump, exclude={"train", "val", "classes", "seed"}),
            **({"seed": instance.data_seed} if instance.data_seed != instance.seed else {}),
        },
        "network": _network_identity(instance.architecture),
        "stage": instance.stage.model_dump(**dump, exclude={"train", "init", "teacher", "seed"}),
    }


def _network_identity(settings: Settings) -> dict[str, Any]:
    """What a recipe says of a network, and of the user's own the checksum of the file that builds it."""
    values = settings.model_dump(mode="json", exclude_defaults=True)
    return {**values, "networks.py": settings.code.sha256} if isinstance(settings, Own) else values


def _looks_like_weights(path: Path) -> bool:
    """Whether a file is intact safetensors, an intact archive of `torch.save`, or a pickle, its format before 1.6."""
    if is_safetensors(path):
        try:
            with safe_open(path, framework="numpy"):
                return True
        except SafetensorError:
            return False
    with path.open("rb") as file:
        starts_as_pickle = file.read(1) == pickle.PROTO
        return starts_as_pickle or zipfile.is_zipfile(file)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def identities(recipe: Recipe, data_checksums: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By key of an instance, all that determines its weights, and nothing of where or under which name it runs.

    An identity holds the format, the values of `recipe_identity`, the checksums of the data's files, and of `init` and
    `teacher` the fingerprint or, of a file, the checksum. Raises RunError if a file of weights cannot be read, or holds
    none.
    """
    by_key: dict[str, dict[str, Any]] = {}
    for key, instance in recipe.instances.items():  # parents first
        own = recipe_identity(instance, recipe)
        by_key[key] = {
            "format": EMA_FORMAT if instance.stage.optim and instance.stage.optim.ema else IDENTITY_FORMAT,
            **own,
            "data": {**data_checksums, **own["data"]},
            "init": _file_identity(instance) or (instance.init and fingerprint(by_key[instance.init])),
            "teacher": instance.teacher and fingerprint(by_key[instance.teacher]),
        }
    return by_key


def _file_identity(instance: Instance) -> str | dict[str, Any] | None:
    """The checksum of the file of weights that an instance starts from, with what else `init` says of it."""
    if (init := instance.init_file) is None:
        return None
    path, options = init.file, init.model_dump(exclude={"file"}, exclude_defaults=True)
    option = f"stages.{instance.stage_name}.init.file: {path}"
    try:
        if _looks_like_weights(path):
            return {"file": sha256(path), **options} if options else sha256(path)
    except OSError as error:
        raise RunError(f"{option}: cannot be read ({error.strerror})") from error
    raise RunError(f"{option}: {no_weights(path)}")
