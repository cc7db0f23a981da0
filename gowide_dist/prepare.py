"""A recipe checked against data, processes and disk, and its run directory written.

Imports no torch, unless a stage starts from a file of weights.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gowide_dist.data.info import DatasetInfo, check_split, read_dataset_info
from gowide_dist.data.preprocessing import Preprocessing, read_preprocessing
from gowide_dist.effects import without_effect
from gowide_dist.errors import DataError, RecipeError, RunError
from gowide_dist.files import is_safetensors, write_atomically
from gowide_dist.identity import fingerprint, identities
from gowide_dist.instances import Instance
from gowide_dist.networks.foreign import Foreign
from gowide_dist.networks.normalise import DATASET
from gowide_dist.progress import say_once
from gowide_dist.recipe import Data, Recipe
from gowide_dist.run import Run, StageDir
from gowide_dist.stages import File, KlStage


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
        done = {key for key in self.selected if self.run.stage(key).is_done(fingerprint(self.identities[key]))}
        return [instance for key, instance in self.selected.items() if key not in done]

    @cached_property
    def _siblings(self) -> dict[str, StageDir]:
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

    def sibling(self, key: str) -> StageDir | None:
        """Where another run in the same folder has finished the same training (fingerprint), to copy its results."""
        return self._siblings.get(fingerprint(self.identities[key]))


def prepare(
    recipe: Recipe, runs: Path, *,
    num_processes: int = 1, on_gpus: bool = False, only: Sequence[str] = (), fresh: bool = False,
) -> Prepared:  # fmt: skip
    """Check the recipe against the data, the processes and the run directory, then write the directory.

    fresh: delete what another recipe has left in the folders of the selected stages. Raises UserError, with nothing
    changed, if anything does not fit.
    """
    check_group(recipe, num_processes, on_gpus=on_gpus)
    prepared = check_run(recipe, runs, only=only, fresh=fresh)
    check_foreign(prepared.recipe, prepared.unfinished)
    write_run(prepared, fresh=fresh)
    return replace(prepared)  # looks at the run directory again


def check_foreign(recipe: Recipe, instances: Collection[Instance]) -> None:
    """Check networks of others, where there are some: that takes torch, and is left to the jobs on a login node.

    Raises UserError if one cannot be built or does not fit.
    """
    if not any(isinstance(each, Foreign) for each in recipe.architectures.values()):
        return
    from gowide_dist.train.fit import check_fit

    assert recipe.data.classes is not None, "checked data fills it in"
    check_fit(recipe, instances, recipe.data.classes)
    foreign = [each for each in instances if isinstance(each.architecture, Foreign)]
    for note in check_files(recipe, foreign, recipe.data.classes):
        say_once(f"note: {note}")


def check_run(
    recipe: Recipe, runs: Path, *, only: Sequence[str] = (), fresh: bool = False, in_jobs: Collection[str] = ()
) -> Prepared:
    """Check the recipe against the data and the run directory, and write nothing. Says what has no effect.

    in_jobs: instances that Slurm jobs are training or will train. Raises UserError if anything does not fit.
    """
    selected = recipe.select(only) if only else recipe.instances
    recipe, checksums = check_data(recipe)
    run = Run(runs / recipe.name)
    for path in (runs, run.path):
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: is not a folder; choose another place with --runs")
    prepared = Prepared(recipe, run, selected, identities(recipe, checksums))
    for instance in prepared.unfinished:
        stage_dir = run.stage(instance.key)
        if instance.key not in in_jobs:
            stage_dir.check_unlocked()
        elif fresh:
            fault = f"{stage_dir.path}: a Slurm job trains {instance.key}"
            raise RunError(f"{fault}; `gowide cancel {run.path}` before --fresh")
        if not fresh:
            stage_dir.check_identity(prepared.identities[instance.key])
    assert recipe.data.classes is not None, "checked data fills it in"
    ours = [each for each in prepared.unfinished if not isinstance(each.architecture, Foreign)]
    for note in check_files(recipe, ours, recipe.data.classes):
        say_once(f"note: {note}")
    for line in without_effect(recipe, prepared.unfinished, check_split(recipe.data.train).samples):
        say_once(f"warning: {line}")
    return prepared


def check_files(recipe: Recipe, instances: Iterable[Instance], num_classes: int) -> Iterator[str]:
    """Notes on the files of weights that instances start from: which names are taken, and where they get images
    normalised otherwise than they expect.

    Raises RunError if a file does not hold its network's weights, or is known to tell other classes apart.
    """
    for instance in instances:
        if instance.init_file:
            yield from _check_weights(instance, instance.init_file, num_classes)
            yield from _check_preprocessing(instance, instance.init_file, recipe)


def _check_weights(instance: Instance, init: File, num_classes: int) -> Iterator[str]:
    from gowide_dist.networks.weights import check_weights  # torch reads the file

    try:
        prefix = check_weights(
            init.file, instance.architecture, num_classes,
            fresh_classifier=init.classifier == "fresh", prefix=init.prefix,
        )  # fmt: skip
    except RunError as error:
        raise RunError(f"stages.{instance.stage_name}.init.file: {error}") from error
    if prefix:
        yield f"{instance.key}: takes the weights of {init.file} that are named {prefix}*"


def _check_preprocessing(instance: Instance, init: File, recipe: Recipe) -> Iterator[str]:
    normalise, option = instance.normalise, f"networks.{instance.network_name}.normalise"
    known = read_preprocessing(init.file) if is_safetensors(init.file) else None
    if known is None:
        if normalise == DATASET:
            yield (
                f"{instance.key}: the weights of {init.file} get images normalised by the dataset's own mean and "
                f"standard deviation; published ones mostly expect {option}: imagenet"
            )
        return
    own = Preprocessing.of(recipe.data, read_dataset_info(recipe.data.train), normalise)
    if init.classifier == "file" and known.classes != own.classes:
        fault = f"classifies {', '.join(known.classes[:2])} ..., the data are {', '.join(own.classes[:2])} ..."
        option = f"stages.{instance.stage_name}.init.file"
        raise RunError(f"{option}: {init.file}: {fault}; classifier: fresh draws a new classifier")
    if (known.mean, known.std) != (own.mean, own.std):
        was, now = (f"mean {[*each.mean]}, std {[*each.std]}" for each in (known, own))
        yield f"{instance.key}: {init.file} was trained with {was}, and gets {now}; {option} says what it gets"


def write_run(prepared: Prepared, *, fresh: bool = False, in_jobs: Collection[str] = ()) -> None:
    """Write the run directory, and adopt what a sibling run has finished. fresh: as in `prepare`.

    in_jobs: instances whose folders are left alone, for Slurm jobs write them.
    """
    run = prepared.run
    for instance in prepared.unfinished if fresh else ():
        run.stage(instance.key).clear()
    run.write_recipe(prepared.recipe)
    adopt(prepared, in_jobs=in_jobs)


def adopt(prepared: Prepared, *, in_jobs: Collection[str] = ()) -> None:
    """Copy what runs beside this one have finished of its unfinished instances, unless a Slurm job writes them."""
    for instance in prepared.unfinished:
        if instance.key not in in_jobs and (finished := prepared.sibling(instance.key)):
            _copy(finished, prepared.run.stage(instance.key), prepared.identities[instance.key])


def _copy(finished: StageDir, to: StageDir, identity: Mapping[str, Any]) -> None:
    """Copy the results of a sibling run."""
    assert finished.done is not None
    with to.lock():
        if StageDir(to.path, to.key).is_done(fingerprint(identity)):
            return  # another job of this run was faster
        to.claim(identity)
        write_atomically(to.model, finished.model.read_bytes())
        if finished.metrics.exists():
            shutil.copyfile(finished.metrics, to.metrics)
        stage, _, network = to.key.partition("/")
        to.finish(finished.done.model_copy(update={"stage": stage, "network": network}))
    sys.stdout.write(f"{to.key}  copied from {finished.path}, where the same stage is done\n")


def check_group(recipe: Recipe, num_processes: int, *, on_gpus: bool) -> None:
    """Raises RecipeError if this number of processes cannot train the recipe."""
    check_share(recipe, num_processes)
    if recipe.sync_batch_norm and num_processes > 1 and not on_gpus:
        fault = f"PyTorch has it for GPUs only, and the {num_processes} processes have none"
        raise RecipeError(f"sync_batch_norm: {fault}; set it to false")


def check_share(recipe: Recipe, num_processes: int) -> None:
    """Raises RecipeError if the processes cannot share the batches or, where the data are encoded, their validation."""
    recipe.check_processes(num_processes)
    with contextlib.suppress(DataError):
        if (num_images := check_split(recipe.data.val).samples) < num_processes:
            fault = f"{recipe.data.val} has {num_images} images for {num_processes} processes"
            raise RecipeError(f"data.val: {fault}; take at most {num_images}")


def check_data(recipe: Recipe) -> tuple[Recipe, dict[str, str]]:
    """The recipe with its class count filled in, and the checksums of its files. Raises UserError if they don't fit."""
    data = recipe.data
    infos = {path: read_dataset_info(path) for path in (data.train, data.val)}
    splits = {path: check_split(path) for path in infos}
    for path, info in infos.items():
        _check_classes(data, path, info)
    if data.augment.crop is None:
        _check_size(data, data.train, infos[data.train], "data.augment.crop", "{scale: [0.08, 1.0]}")
    if data.center_crop is None:
        _check_size(data, data.val, infos[data.val], "data.center_crop", "0.875")
    _check_batch_size(recipe, splits[data.train].samples)
    _check_same_classes(data, infos)
    num_classes = len(infos[data.train].classes)
    _check_losses(recipe, num_classes)
    resolved = recipe.model_copy(update={"data": data.model_copy(update={"classes": num_classes})})
    return resolved, {"train": splits[data.train].checksum, "val": splits[data.val].checksum}


def _check_classes(data: Data, path: Path, info: DatasetInfo) -> None:
    if data.classes not in (None, len(info.classes)):
        raise DataError(f"data.classes: {path} has {len(info.classes)} classes, the recipe says {data.classes}")
    if len(info.classes) == 1:
        raise DataError(f"{path}: has one class, {info.classes[0]}, so that there is nothing to tell apart; encode two")


def _check_size(data: Data, path: Path, info: DatasetInfo, option: str, example: str) -> None:
    """Images that are not cropped must be squares of the resolution. option: crops them, for example by `example`."""
    say_how = f"say how they become {data.resolution} px, for example {option}: {example}"
    if info.fixed_side_px is None:
        sides = f"{info.min_side_px} to {info.max_side_px}"
        raise DataError(f"{option}: the images of {path} have {sides} px; {say_how}")
    if info.fixed_side_px != data.resolution:
        fault = f"the images of {path} have {info.fixed_side_px} px, the recipe says {data.resolution}"
        raise DataError(f"data.resolution: {fault}; take their side, or {say_how}")


def _check_batch_size(recipe: Recipe, num_images: int) -> None:
    if num_images < (size := recipe.batch_size):
        path = recipe.data.train
        raise DataError(f"batch_size: {size} is more than the {num_images} images of {path}; take a smaller one")


def _check_same_classes(data: Data, infos: Mapping[Path, DatasetInfo]) -> None:
    if infos[data.train].classes != infos[data.val].classes:
        raise DataError(f"data: {data.train} and {data.val} have different classes; encode both parts together")


def _check_losses(recipe: Recipe, num_classes: int) -> None:
    """Raises RecipeError if the loss of a stage says nothing of so few classes."""
    for name, stage in recipe.stages.items():
        if not isinstance(stage, KlStage):
            continue
        if stage.top_k and stage.top_k >= num_classes:
            raise RecipeError(f"stages.{name}.top_k: {stage.top_k} of {num_classes} classes; leave it out to keep all")
        if stage.standardise and num_classes == 2:
            fault = "the z-scores of two classes differ in sign alone, so that nothing is learnt from them"
            raise RecipeError(f"stages.{name}.standardise: {fault}; leave it out")
        if stage.loss == "dkd" and not stage.target_weight and num_classes == 2:
            fault = "of two classes, there is one other than the label, and nothing is learnt from others_weight"
            raise RecipeError(f"stages.{name}.target_weight: {fault}; set it above 0")
