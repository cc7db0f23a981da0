"""A recipe checked against data, processes and disk, and its run directory written. Imports no torch."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gowide_dist.data.info import DatasetInfo, check_split, read_dataset_info
from gowide_dist.errors import DataError, RecipeError, RunError
from gowide_dist.files import write_atomically
from gowide_dist.identity import fingerprint, identities
from gowide_dist.recipe import Instance, KlStage, Recipe
from gowide_dist.run import Run, StageDir


@dataclass(frozen=True)
class Prepared:
    """A checked recipe and its run directory."""

    recipe: Recipe
    run: Run
    selected: Mapping[str, Instance]
    identities: Mapping[str, Mapping[str, Any]]

    @property
    def unfinished(self) -> list[Instance]:
        """The selected instances that are not done, parents first."""
        return [
            instance
            for key, instance in self.selected.items()
            if not self.run.stage(key).is_done(fingerprint(self.identities[key]))
        ]


def prepare(
    recipe: Recipe,
    runs: Path,
    *,
    num_processes: int = 1,
    on_gpus: bool = False,
    only: Sequence[str] = (),
    fresh: bool = False,
) -> Prepared:
    """Check the recipe against the data, the processes and the run directory, then write the directory.

    `fresh` forgets what another recipe left in the places of the selected stages. Raises UserError, with nothing
    changed, if anything does not fit.
    """
    check_group(recipe, num_processes, on_gpus=on_gpus)
    prepared = check_run(recipe, runs, only=only, fresh=fresh)
    write_run(prepared, fresh=fresh)
    return prepared


def check_run(
    recipe: Recipe, runs: Path, *, only: Sequence[str] = (), fresh: bool = False, in_jobs: Collection[str] = ()
) -> Prepared:
    """Check the recipe against the data and the run directory, and write nothing.

    in_jobs: instances that Slurm jobs are training or will train. Raises UserError if anything does not fit.
    """
    selected = recipe.select(only) if only else recipe.instances
    recipe, checksums = check_data(recipe)
    run = Run(runs / recipe.name)
    for path in (runs, run.path):
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is no folder; choose another place with --runs")
    prepared = Prepared(recipe, run, selected, identities(recipe, checksums))
    for instance in prepared.unfinished:
        place = run.stage(instance.key)
        if instance.key not in in_jobs:
            place.check_unlocked()
        elif fresh:
            raise RunError(
                f"{place.path}: a Slurm job trains {instance.key}; `gowide cancel {run.path}` before --fresh"
            )
        if not fresh:
            place.check_identity(prepared.identities[instance.key])
    return prepared


def write_run(prepared: Prepared, *, fresh: bool = False, in_jobs: Collection[str] = ()) -> None:
    """Write the run directory, and take over what a sibling run has finished. `fresh` as in `prepare`.

    in_jobs: instances whose folders are left alone, for Slurm jobs write them.
    """
    run = prepared.run
    for instance in prepared.unfinished if fresh else ():
        run.stage(instance.key).forget()
    run.write_recipe(prepared.recipe)
    for instance in prepared.unfinished:
        if instance.key not in in_jobs and (there := sibling(instance, prepared)):
            _adopt(instance, there, prepared)


def check_group(recipe: Recipe, num_processes: int, *, on_gpus: bool) -> None:
    """Raises RecipeError if so many processes cannot train the recipe."""
    recipe.check_processes(num_processes)
    if recipe.sync_batch_norm and num_processes > 1 and not on_gpus:
        raise RecipeError(
            f"sync_batch_norm: PyTorch has it for GPUs only, and the {num_processes} processes have none; "
            "set it to false"
        )


def check_data(recipe: Recipe) -> tuple[Recipe, dict[str, str]]:
    """The recipe with its class count filled in, and the checksums of its files. Raises DataError if they don't fit."""
    data = recipe.data
    cuts = {"train": ("augment.crop", data.augment.crop, "{scale: [0.08, 1.0]}"),
            "val": ("center_crop", data.center_crop, "0.875")}  # fmt: skip
    infos: dict[str, DatasetInfo] = {}
    checksums: dict[str, str] = {}
    for name, path in (("train", data.train), ("val", data.val)):
        infos[name] = info = read_dataset_info(path)
        split = check_split(path)
        checksums[name] = split.checksum
        if data.classes not in (None, len(info.classes)):
            raise DataError(f"data.classes: {path} has {len(info.classes)} classes, the recipe says {data.classes}")
        if info.fixed_side_px not in (None, data.resolution):
            raise DataError(
                f"data.resolution: the images of {path} have {info.fixed_side_px} px, the recipe says {data.resolution}"
            )
        key, given, example = cuts[name]
        if info.fixed_side_px is None and given is None:
            raise DataError(
                f"data.{key}: the images of {path} have {info.min_side_px} to {info.max_side_px} px; "
                f"say how they become {data.resolution} px, for example data.{key}: {example}"
            )
        if name == "train" and split.samples < recipe.batch_size:
            raise DataError(
                f"batch_size: {recipe.batch_size} is more than the {split.samples} images of {path}; take a smaller one"
            )
    if infos["train"].classes != infos["val"].classes:
        raise DataError(f"data: {data.train} and {data.val} have different classes; encode both parts together")
    classes = len(infos["train"].classes)
    for name, stage in recipe.stages.items():
        if isinstance(stage, KlStage) and stage.top_k and stage.top_k >= classes:
            raise RecipeError(f"stages.{name}.top_k: {stage.top_k} of {classes} classes; leave it out to keep all")
    return recipe.model_copy(update={"data": data.model_copy(update={"classes": classes})}), checksums


def sibling(instance: Instance, prepared: Prepared) -> StageDir | None:
    """Where another run beside this one has finished the same instance, with its weights as they were."""
    mine = fingerprint(prepared.identities[instance.key])
    for path in sorted(prepared.run.path.parent.glob("*/stages/*/*/done.json")):
        place = StageDir(path.parent, "/".join(path.parts[-3:-1]))
        with contextlib.suppress(RunError):
            if place.is_done(mine):
                place.check_weights()
                return place
    return None


def _adopt(instance: Instance, there: StageDir, prepared: Prepared) -> None:
    """Take over what another run has finished."""
    here = prepared.run.stage(instance.key)
    assert there.done is not None
    with here.lock():
        here.claim(prepared.identities[instance.key])
        write_atomically(here.model, there.model.read_bytes())
        if there.metrics.exists():
            shutil.copyfile(there.metrics, here.metrics)
        here.finish(there.done.model_copy(update={"stage": instance.stage_name, "network": instance.network_name}))
    sys.stdout.write(f"{instance.key}  is {there.path} already: taken from there\n")
