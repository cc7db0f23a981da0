"""Recipes: what to train, as data. Networks by name, stages by name, a graph by reference.

`load_recipe` checks all that does not depend on other files; `prepare` checks the data. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from gowide_dist.errors import RecipeError
from gowide_dist.networks.architecture import Architecture
from gowide_dist.schema import (
    Count,
    Fraction,
    Frozen,
    Name,
    Natural,
    Positive,
    Seed,
    apply_override,
    nearest,
    read_yaml,
    validate,
)
from gowide_dist.stages import (
    BlocksStage,
    File,
    KlStage,
    LabelsStage,
    Optim,
    Phase,
    Ramp,
    Schedule,
    Stage,
    StageBase,
    TaughtStage,
)
from gowide_dist.timeline import Batching

__all__ = [
    "Augment", "BlocksStage", "Checkpoints", "Data", "Instance", "KlStage", "LabelsStage", "Network", "Optim", "Phase",
    "Ramp", "RandomCrop", "Recipe", "Schedule", "Stage", "StageBase", "TaughtStage", "Widened", "load_recipe",
]  # fmt: skip


class RandomCrop(Frozen):
    """torchvision's RandomResizedCrop, with its defaults."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)  # area of the crop over that of the image: least, greatest
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # width over height: least, greatest

    @model_validator(mode="after")
    def _check(self) -> RandomCrop:
        if not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale: should be [least, greatest] part of the area, at most 1")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError("ratio: should be [least, greatest] width over height")
        return self


class Augment(Frozen):
    """Augmentation of training images, a function of (seed, epoch, sample index)."""

    flip: bool = False
    translate: Natural = 0  # px, in each direction
    crop: RandomCrop | None = None


class Data(Frozen):
    """The FFCV files, with `dataset.json` beside them, and how their images are read."""

    train: Path
    val: Path
    resolution: Count  # px
    classes: Count | None = None  # default: dataset.json's
    augment: Augment = Augment()
    center_crop: Annotated[Fraction, Field(gt=0)] | None = None  # side of a validation crop over the shorter side
    order: Literal["random", "quasi-random"] = "random"  # quasi-random: for files larger than memory
    seed: Seed | None = None  # of order and augmentation, by default the stage's: one stream for runs of several seeds

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.augment.translate >= self.resolution:
            raise ValueError(
                f"augment.translate: should be less than resolution ({self.resolution} px), "
                f"not {self.augment.translate} px"
            )
        return self


class Widened(Frozen):
    """Network `widen` of the recipe with `by` times as many 3x3 filters in each unit."""

    widen: Name
    by: Positive


Network = Annotated[
    Annotated[Architecture, Tag("architecture")] | Annotated[Widened, Tag("widened")],
    Discriminator(
        lambda value: (
            "widened"
            if isinstance(value, Widened) or (isinstance(value, Mapping) and "widen" in value)
            else "architecture"
        )
    ),
]


class Checkpoints(Frozen):
    """When the training state is saved. `keep`: the newest N stay on disk."""

    every_minutes: Positive | None = 10.0
    every_steps: Count | None = None
    keep: Count = 2


class Instance(NamedTuple):
    """One stage for one network: what is trained, stored and fingerprinted. Other instances are named by their key.

    The same instance elsewhere: `StageDir` is its folder, `Done` its result, `StagePlan` its expected cost,
    `StageStatus` its progress and its job, `RunResults.rows` has its row in a report.
    """

    stage_name: str
    network_name: str
    stage: Stage
    architecture: Architecture
    seed: int
    data_seed: int  # of order and augmentation
    init: str | None  # the instance whose weights this one starts from,
    init_file: Path | None  # or the file
    teacher: str | None  # the instance that teaches this one

    @property
    def key(self) -> str:
        """`stage/network`: the name on the command line, and the folder under `stages/`."""
        return f"{self.stage_name}/{self.network_name}"

    @property
    def parents(self) -> tuple[str, ...]:
        """The instances whose weights this one needs."""
        return tuple(dict.fromkeys(key for key in (self.init, self.teacher) if key))


class Recipe(Frozen):
    """An experiment. The weights depend on all but `name`, `log_every_steps`, `eval_every_epochs` and `checkpoints`.

    `instances` are its graph: raises RecipeError if references do not form one.
    """

    name: Name
    seed: Seed = 0
    data: Data
    batch_size: Count  # the global batch, for any number of processes
    networks: dict[Name, Network] = Field(min_length=1)
    stages: dict[Name, Stage] = Field(min_length=1)
    # Of convolutions and matrix products; weights stay float32. tf32: on GPUs, on CPUs as float32.
    precision: Literal["float32", "tf32", "bf16", "fp16"] = "float32"
    compile: bool = False  # by torch.compile
    sync_batch_norm: bool = False  # batch statistics over all processes; more than one need GPUs
    log_every_steps: Count = 50
    eval_every_epochs: Count = 1
    checkpoints: Checkpoints = Checkpoints()

    @cached_property
    def architectures(self) -> dict[str, Architecture]:
        """Every network; a `Widened` one is resolved. Raises RecipeError on a bad reference."""
        return {name: self._resolve(name, ()) for name in self.networks}

    @cached_property
    def instances(self) -> dict[str, Instance]:
        """The graph of stage instances by key, parents before children. Raises RecipeError if it is none."""
        instances = {
            instance.key: instance
            for name, stage in self.stages.items()
            for instance in self._instances_of(name, stage)
        }
        for instance in instances.values():
            _check_parents(instance, instances)
            _check_ramp(instance, self.data)
        return {key: instances[key] for key in _in_order({key: each.parents for key, each in instances.items()})}

    def select(self, stages: Iterable[str]) -> dict[str, Instance]:
        """The named instances (`stage` or `stage/network`) and their ancestors, parents before children."""
        wanted: set[str] = set()
        for name in stages:
            keys = [key for key in self.instances if name in (key, key.partition("/")[0])]
            if not keys:
                raise RecipeError(f"no stage '{name}' in recipe {self.name}, {nearest(name, list(self.stages))}")
            wanted.update(keys)
        for key in reversed(self.instances):
            if key in wanted:
                wanted.update(self.instances[key].parents)
        return {key: instance for key, instance in self.instances.items() if key in wanted}

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def check_processes(self, num_processes: int) -> None:
        """Raises RecipeError if the global batch, or a process's local batch, cannot be divided equally."""
        if self.batch_size % num_processes:
            raise RecipeError(
                f"batch_size: {self.batch_size} is not divisible by {num_processes} processes; "
                f"take a multiple of {num_processes}"
            )
        local_batch = Batching(self.batch_size, num_processes).local_batch
        for name, stage in self.stages.items():
            if stage.optim and local_batch % stage.optim.accumulate:
                raise RecipeError(
                    f"stages.{name}.optim.accumulate: the local batch of {local_batch} images is not divisible by "
                    f"{stage.optim.accumulate}"
                )

    def _resolve(self, name: str, seen: tuple[str, ...]) -> Architecture:
        network = self.networks[name]
        if isinstance(network, Architecture):
            return network
        if network.widen in (*seen, name):
            raise RecipeError(f"networks.{name}.widen: dependency cycle {' -> '.join((*seen, name, network.widen))}")
        if network.widen not in self.networks:
            raise RecipeError(
                f"networks.{name}.widen: no network '{network.widen}', {nearest(network.widen, list(self.networks))}"
            )
        return self._resolve(network.widen, (*seen, name)).widened(network.by)

    def _instances_of(self, name: str, stage: Stage) -> Iterator[Instance]:
        if len(set(stage.train)) < len(stage.train):
            raise RecipeError(f"stages.{name}.train: names a network twice")
        for network in stage.train:
            if network not in self.networks:
                raise RecipeError(
                    f"stages.{name}.train: no network '{network}', {nearest(network, list(self.networks))}"
                )
            init = teacher = None
            if isinstance(stage.init, str):
                init = self._parent(f"stages.{name}.init", stage.init, prefer=network)
            if isinstance(stage, TaughtStage):
                teacher = self._parent(f"stages.{name}.teacher", stage.teacher, prefer=None)
            seed = self.seed if stage.seed is None else stage.seed
            yield Instance(
                name,
                network,
                stage,
                self.architectures[network],
                seed=seed,
                data_seed=seed if self.data.seed is None else self.data.seed,
                init=init,
                init_file=stage.init.file if isinstance(stage.init, File) else None,
                teacher=teacher,
            )

    def _parent(self, option: str, reference: str, prefer: str | None) -> str:
        """The key of the instance that `reference` names: `stage/network`, or `stage` for its network `prefer`."""
        stage_name, _, network = reference.partition("/")
        if stage_name not in self.stages:
            raise RecipeError(f"{option}: no stage '{stage_name}', {nearest(stage_name, list(self.stages))}")
        trained = self.stages[stage_name].train
        network = network or prefer or (trained[0] if len(trained) == 1 else "")
        if not network:
            choices = ", ".join(f"{stage_name}/{name}" for name in trained)
            raise RecipeError(f"{option}: stage '{stage_name}' trains several networks, name one: {choices}")
        if network not in trained:
            raise RecipeError(
                f"{option}: stage '{stage_name}' does not train network '{network}' but {', '.join(trained)}"
            )
        return f"{stage_name}/{network}"


def _check_parents(instance: Instance, instances: Mapping[str, Instance]) -> None:
    """Raises RecipeError unless the weights of `init` and the blocks of the teacher fit the instance's network."""
    student, stage = instance.architecture, instance.stage
    option, network = f"stages.{instance.stage_name}", f"network '{instance.network_name}'"
    if instance.init and instances[instance.init].architecture != student:
        raise RecipeError(f"{option}.init: {instance.init} has another architecture than {network}")
    if not isinstance(stage, TaughtStage):
        return
    assert instance.teacher is not None, "a stage that is taught names its teacher"
    teacher = instances[instance.teacher].architecture
    if isinstance(stage, BlocksStage) and (student.num_blocks, student.stem) != (teacher.num_blocks, teacher.stem):
        raise RecipeError(
            f"{option}.teacher: the blocks of {instance.teacher} ({teacher.num_blocks} blocks, {teacher.stem} stem) "
            f"do not match those of {network} ({student.num_blocks} blocks, {student.stem} stem)"
        )
    if stage.start == "teacher" and (student.stem, student.stem_channels) != (teacher.stem, teacher.stem_channels):
        raise RecipeError(
            f"{option}.start: the stem of {instance.teacher} ({teacher.stem}, {teacher.stem_channels} channels) does "
            f"not fit {network} ({student.stem}, {student.stem_channels}); take start: fresh, or reduce its width "
            "instead of its channels"
        )


def _check_ramp(instance: Instance, data: Data) -> None:
    """Raises RecipeError if the data does not allow the stage's progressive resizing."""
    if (ramp := instance.stage.ramp) is None:
        return
    if data.augment.crop is None:
        raise RecipeError(
            f"stages.{instance.stage_name}.ramp: resizes what data.augment.crop cuts out, which is not set"
        )
    if ramp.start_px > data.resolution:
        raise RecipeError(
            f"stages.{instance.stage_name}.ramp.start_px: {ramp.start_px} is more than the resolution {data.resolution}"
        )


def _in_order(parents: Mapping[str, Sequence[str]]) -> list[str]:
    """Keys with parents before children, otherwise in the order of the recipe. Raises RecipeError on a cycle."""
    ordered: list[str] = []
    waiting = list(parents)
    while waiting:
        ready = [key for key in waiting if all(parent in ordered for parent in parents[key])]
        if not ready:
            raise RecipeError(f"stages: dependency cycle among {', '.join(waiting)}")
        ordered += ready[:1]
        waiting.remove(ready[0])
    return ordered


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted key, as in the YAML file, of a location that pydantic gives for a fault.

    pydantic inserts the tag of a union's member behind the member's name: ("stages", "distill", "kl", "epochs"), and
    once more for the union below `init`: ("stages", "distill", "kl", "init", "file", "path"). Behind the name of a
    mapping's entry, "[key]" says that the name itself is at fault.
    """
    parts = [str(part) for part in location]
    if parts[:1] in (["networks"], ["stages"]) and len(parts) > 2 and parts[2] != "[key]":
        del parts[2]
        if parts[2:3] == ["init"]:
            del parts[3:4]
    return ".".join(part for part in parts if part != "[key]")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe in a YAML file, with overrides `dotted.key=value` applied.

    Raises RecipeError: one line with the file, the dotted key and what to write instead.
    """
    values = read_yaml(Path(path))
    for override in overrides:
        apply_override(values, override)
    recipe = validate(Recipe, values, str(path), _key)
    try:
        _ = recipe.instances  # checks the graph
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe
