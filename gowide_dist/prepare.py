"""A recipe checked against data, processes and disk, and its run directory written. Imports no torch."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gowide_dist.data.info import DatasetInfo, check_split, read_dataset_info
from gowide_dist.errors import DataError, RecipeError, RunError
from gowide_dist.files import write_atomically
from gowide_dist.identity import fingerprint, identities
from gowide_dist.recipe import Data, Instance, KlStage, Recipe
from gowide_dist.run import Run, StageDir


@dataclass(frozen=True)
class Prepared:
    """A checked recipe and its run directory, as it was when `unfinished` and `siblings` were first asked for."""

    recipe: Recipe
    run: Run
    selected: Mapping[str, Instance]
    identities: Mapping[str, Mapping[str, Any]]

    @cached_property
    def unfinished(self) -> list[Instance]:
        """The selected instances that are not done, parents first."""
        return [
            instance
            for key, instance in self.selected.items()
            if not self.run.stage(key).is_done(fingerprint(self.identities[key]))
        ]

    @cached_property
    def siblings(self) -> dict[str, StageDir]:
        """By fingerprint of an unfinished instance: where a run beside this one has finished it, weights intact."""
        wanted = {fingerprint(self.identities[instance.key]) for instance in self.unfinished}
        siblings: dict[str, StageDir] = {}
        for path in sorted(self.run.path.parent.glob("*/stages/*/*/done.json")) if wanted else ():
            stage_dir = StageDir(path.parent, "/".join(path.parts[-3:-1]))
            with contextlib.suppress(RunError):  # another run's damaged file is no error of this one
                if stage_dir.done and stage_dir.done.fingerprint in wanted - siblings.keys():
                    stage_dir.check_weights()
                    siblings[stage_dir.done.fingerprint] = stage_dir
        return siblings


def sibling(instance: Instance, prepared: Prepared) -> StageDir | None:
    """Where another run beside this one has finished an unfinished instance."""
    return prepared.siblings.get(fingerprint(prepared.identities[instance.key]))


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

    fresh: delete what another recipe has left in the folders of the selected stages. Raises UserError, with nothing
    changed, if anything does not fit.
    """
    check_group(recipe, num_processes, on_gpus=on_gpus)
    prepared = check_run(recipe, runs, only=only, fresh=fresh)
    write_run(prepared, fresh=fresh)
    return replace(prepared)  # looks at the run directory again


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
        stage_dir = run.stage(instance.key)
        if instance.key not in in_jobs:
            stage_dir.check_unlocked()
        elif fresh:
            raise RunError(
                f"{stage_dir.path}: a Slurm job trains {instance.key}; `gowide cancel {run.path}` before --fresh"
            )
        if not fresh:
            stage_dir.check_identity(prepared.identities[instance.key])
    return prepared


def write_run(prepared: Prepared, *, fresh: bool = False, in_jobs: Collection[str] = ()) -> None:
    """Write the run directory, and adopt what a sibling run has finished. fresh: as in `prepare`.

    in_jobs: instances whose folders are left alone, for Slurm jobs write them.
    """
    run = prepared.run
    for instance in prepared.unfinished if fresh else ():
        run.stage(instance.key).clear()
    run.write_recipe(prepared.recipe)
    for instance in prepared.unfinished:
        if instance.key not in in_jobs and (finished := sibling(instance, prepared)):
            _adopt(instance, finished, prepared)


def _adopt(instance: Instance, finished: StageDir, prepared: Prepared) -> None:
    """Copy the results of a sibling run."""
    stage_dir = prepared.run.stage(instance.key)
    assert finished.done is not None
    with stage_dir.lock():
        stage_dir.claim(prepared.identities[instance.key])
        write_atomically(stage_dir.model, finished.model.read_bytes())
        if finished.metrics.exists():
            shutil.copyfile(finished.metrics, stage_dir.metrics)
        names = {"stage": instance.stage_name, "network": instance.network_name}
        stage_dir.finish(finished.done.model_copy(update=names))
    sys.stdout.write(f"{instance.key}  copied from {finished.path}, where the same stage is done\n")


def check_group(recipe: Recipe, num_processes: int, *, on_gpus: bool) -> None:
    """Raises RecipeError if this number of processes cannot train the recipe."""
    recipe.check_processes(num_processes)
    if recipe.sync_batch_norm and num_processes > 1 and not on_gpus:
        raise RecipeError(
            f"sync_batch_norm: PyTorch has it for GPUs only, and the {num_processes} processes have none; "
            "set it to false"
        )


def check_data(recipe: Recipe) -> tuple[Recipe, dict[str, str]]:
    """The recipe with its class count filled in, and the checksums of its files. Raises UserError if they don't fit."""
    data = recipe.data
    train, val = read_dataset_info(data.train), read_dataset_info(data.val)
    train_split, val_split = check_split(data.train), check_split(data.val)
    for path, info in ((data.train, train), (data.val, val)):
        _check_classes(data, path, info)
        _check_resolution(data, path, info)
    if data.augment.crop is None:
        _check_fixed_size("augment.crop: {scale: [0.08, 1.0]}", data, data.train, train)
    if data.center_crop is None:
        _check_fixed_size("center_crop: 0.875", data, data.val, val)
    if train_split.samples < recipe.batch_size:
        raise DataError(
            f"batch_size: {recipe.batch_size} is more than the {train_split.samples} images of {data.train}; "
            "take a smaller one"
        )
    if train.classes != val.classes:
        raise DataError(f"data: {data.train} and {data.val} have different classes; encode both parts together")
    _check_top_k(recipe, len(train.classes))
    resolved = data.model_copy(update={"classes": len(train.classes)})
    return recipe.model_copy(update={"data": resolved}), {"train": train_split.checksum, "val": val_split.checksum}


def _check_classes(data: Data, path: Path, info: DatasetInfo) -> None:
    if data.classes not in (None, len(info.classes)):
        raise DataError(f"data.classes: {path} has {len(info.classes)} classes, the recipe says {data.classes}")


def _check_resolution(data: Data, path: Path, info: DatasetInfo) -> None:
    if info.fixed_side_px not in (None, data.resolution):
        raise DataError(
            f"data.resolution: the images of {path} have {info.fixed_side_px} px, the recipe says {data.resolution}"
        )


def _check_fixed_size(example: str, data: Data, path: Path, info: DatasetInfo) -> None:
    """Images that are not cropped must all have one size. example: the option that would crop them."""
    if info.fixed_side_px is None:
        raise DataError(
            f"data.{example.partition(':')[0]}: the images of {path} have {info.min_side_px} to {info.max_side_px} px; "
            f"say how they become {data.resolution} px, for example data.{example}"
        )


def _check_top_k(recipe: Recipe, num_classes: int) -> None:
    for name, stage in recipe.stages.items():
        if isinstance(stage, KlStage) and stage.top_k and stage.top_k >= num_classes:
            raise RecipeError(f"stages.{name}.top_k: {stage.top_k} of {num_classes} classes; leave it out to keep all")
