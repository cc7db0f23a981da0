"""Recipes: what to train, as data. Networks by name, stages by name, a graph by reference.

`load_recipe` checks all that does not depend on other files; `prepare` checks the data. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from gowide_dist.errors import RecipeError
from gowide_dist.instances import Instance, check_classifier, check_parents, check_teacher_bits, in_order
from gowide_dist.networks.architecture import Architecture, MobileArchitecture, Structure
from gowide_dist.networks.foreign import (
    Code,
    Foreign,
    Own,
    Settings,
    Timm,
    Torchvision,
    read_code,
    settings_class,
)
from gowide_dist.networks.normalise import Normalise
from gowide_dist.schema import (
    Count,
    Fraction,
    Frozen,
    Name,
    Natural,
    NonNegative,
    Positive,
    Seed,
    UserPath,
    nearest,
    read_yaml,
    validate,
)
from gowide_dist.stages import File, KlStage, LogitsStage, Stage, TaughtStage
from gowide_dist.timeline import Batching


def _check_box(scale: tuple[float, float], ratio: tuple[float, float], sides: str) -> None:
    if not scale[0] <= scale[1] <= 1:
        raise ValueError("scale: should be [least, greatest] part of the area, at most 1")
    if ratio[0] > ratio[1]:
        raise ValueError(f"ratio: should be [least, greatest] {sides}")


class RandomCrop(Frozen):
    """torchvision's RandomResizedCrop, with its defaults."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)  # area of the crop over that of the image: least, greatest
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # width over height: least, greatest

    @model_validator(mode="after")
    def _check(self) -> RandomCrop:
        _check_box(self.scale, self.ratio, "width over height")
        return self


class RandAugment(Frozen):
    """torchvision's RandAugment, with its defaults."""

    num_ops: Count = 2  # of an image, one after the other
    magnitude: Annotated[Natural, Field(le=30)] = 9


class ColorJitter(Frozen):
    """torchvision's ColorJitter: each factor is drawn from 1 - x to 1 + x, the hue's shift from -x to x."""

    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: Annotated[NonNegative, Field(le=0.5)] = 0.0  # part of the whole colour wheel

    @model_validator(mode="after")
    def _check(self) -> ColorJitter:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError("should set brightness, contrast, saturation or hue above 0; all are 0")
        return self


class Erase(Frozen):
    """torchvision's RandomErasing, with its defaults. `0.1` is short for `{probability: 0.1}`."""

    probability: Annotated[Fraction, Field(gt=0)]
    scale: tuple[Positive, Positive] = (0.02, 0.33)  # area of the box over that of the image: least, greatest
    ratio: tuple[Positive, Positive] = (0.3, 3.3)  # height over width: least, greatest

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        return values if isinstance(values, Mapping | Erase) else {"probability": values}

    @model_validator(mode="after")
    def _check(self) -> Erase:
        _check_box(self.scale, self.ratio, "height over width")
        least = self.scale[0]
        if least == 1 or self.ratio[1] <= least or self.ratio[0] >= 1 / least:
            raise ValueError("erases nothing: no box of this scale and ratio is smaller than the image on both sides")
        return self


class Augment(Frozen):
    """Augmentation of training images, a function of (seed, epoch, sample index), in the order of the keys."""

    flip: bool = False
    translate: Natural = 0  # px, in each direction
    crop: RandomCrop | None = None
    trivial_augment: bool = False  # torchvision's TrivialAugmentWide
    rand_augment: RandAugment | None = None
    color_jitter: ColorJitter | None = None
    erase: Erase | None = None

    @model_validator(mode="after")
    def _check(self) -> Augment:
        if self.trivial_augment and self.rand_augment:
            raise ValueError("trivial_augment and rand_augment are policies for the same images; keep one of them")
        return self


class Data(Frozen):
    """The FFCV files, with `dataset.json` beside them, and how their images are read."""

    train: UserPath
    val: UserPath
    resolution: Count  # px
    classes: Count | None = None  # default: dataset.json's
    augment: Augment = Augment()
    center_crop: Annotated[Fraction, Field(gt=0)] | None = None  # side of a validation crop over the shorter side
    order: Literal["random", "quasi-random"] = "random"  # quasi-random: for files larger than memory
    seed: Seed | None = None  # of order and augmentation, by default the stage's: one stream for runs of several seeds

    @model_validator(mode="after")
    def _check(self) -> Data:
        shift, side = self.augment.translate, self.resolution
        if shift >= side:
            raise ValueError(f"augment.translate: should be less than resolution ({side} px), not {shift} px")
        return self


class Widened(Frozen):
    """Network `widen` of the recipe, `by` times as wide inside its units."""

    widen: Name
    by: Positive
    normalise: Normalise | None = None  # default: that of `widen`


def _network_tag(value: object) -> str:
    is_widened = "widen" in value if isinstance(value, Mapping) else isinstance(value, Widened)
    return "widened" if is_widened else settings_class(value).__name__


Network = Annotated[
    Annotated[Architecture, Tag("Architecture")]
    | Annotated[MobileArchitecture, Tag("MobileArchitecture")]
    | Annotated[Timm, Tag("Timm")]
    | Annotated[Torchvision, Tag("Torchvision")]
    | Annotated[Own, Tag("Own")]
    | Annotated[Widened, Tag("widened")],
    Discriminator(_network_tag),
]


class Checkpoints(Frozen):
    """When the training state is saved. `keep`: the newest N stay on disk."""

    every_minutes: Positive | None = 10.0
    every_steps: Count | None = None
    keep: Count = 2


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
    def architectures(self) -> dict[str, Settings]:
        """Every network; a `Widened` one is resolved. Raises RecipeError on a bad reference."""
        return {name: self._resolve(name, ()) for name in self.networks}

    @property
    def code(self) -> Code | None:
        """The file of the user's own networks; None without such a network. Raises RecipeError if it was not given."""
        return next((network.code for network in self.networks.values() if isinstance(network, Own)), None)

    @cached_property
    def instances(self) -> dict[str, Instance]:
        """The graph of stage instances by key, parents before children. Raises RecipeError if it is none."""
        instances = {each.key: each for name, stage in self.stages.items() for each in self._instances_of(name, stage)}
        for instance in instances.values():
            check_parents(instance, instances)
            check_classifier(instance, instances)
            check_teacher_bits(instance, instances)
            _check_ramp(instance, self.data)
        return in_order(instances)

    def select(self, stages: Iterable[str]) -> dict[str, Instance]:
        """The named instances (`stage` or `stage/network`) and their ancestors, parents before children."""
        wanted: set[str] = set()
        for name in stages:
            keys = [key for key in self.instances if name in (key, key.partition("/")[0])]
            if not keys:
                raise RecipeError(f"no stage '{name}' in recipe {self.name}, {nearest(name, self.stages)}")
            wanted.update(keys)
        for key in reversed(self.instances):
            if key in wanted:
                wanted.update(self.instances[key].parents)
        return {key: instance for key, instance in self.instances.items() if key in wanted}

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def check_processes(self, num_processes: int) -> None:
        """Raises RecipeError if the global batch, or a process's local batch, cannot be divided equally or paired."""
        if self.batch_size % num_processes:
            raise RecipeError(
                f"batch_size: {self.batch_size} is not divisible by {num_processes} processes; "
                f"take a multiple of {num_processes}"
            )
        for name, stage in self.stages.items():
            accumulate = stage.optim.accumulate if stage.optim else 1
            batching = Batching(self.batch_size, num_processes, accumulate=accumulate)
            local_batch = batching.local_batch
            if local_batch % accumulate:
                raise RecipeError(
                    f"stages.{name}.optim.accumulate: the local batch of {local_batch} images is not divisible by "
                    f"{accumulate}"
                )
            if isinstance(stage, LogitsStage) and stage.is_mixed and local_batch % 2:
                raise RecipeError(
                    f"stages.{name}: {'mixup' if stage.mixup else 'cutmix'} mixes pairs of images, but the local batch "
                    f"of {local_batch} is odd; take a batch_size that is a multiple of {2 * num_processes}"
                )
            if stage.epochs and batching.micro_batch == 1:
                self._check_single_images(name, stage, num_processes)

    def _check_single_images(self, name: str, stage: Stage, num_processes: int) -> None:
        """Raises RecipeError if a stage has no use for a process that takes one image at a time."""
        one = "a process takes one image at a time; take fewer processes, a smaller accumulate or a larger batch_size"
        if isinstance(stage, KlStage) and stage.loss == "dist":
            raise RecipeError(f"stages.{name}.loss: dist correlates over a batch, and {one}")
        if self.sync_batch_norm and num_processes > 1:
            return
        side = stage.ramp.start_px if stage.ramp else self.data.resolution
        for network in stage.train:
            architecture = self.architectures[network]
            if isinstance(architecture, Structure) and side <= architecture.reductions[-1]:
                fault = f"network '{network}' makes one pixel of {side} px, which no batch norm can normalise"
                raise RecipeError(f"stages.{name}: {fault}, as {one}")

    def _resolve(self, name: str, seen: tuple[str, ...]) -> Settings:
        network = self.networks[name]
        if not isinstance(network, Widened):
            return network
        narrow = network.widen
        if narrow in (*seen, name):
            raise RecipeError(f"networks.{name}.widen: dependency cycle {' -> '.join((*seen, name, narrow))}")
        if narrow not in self.networks:
            raise RecipeError(f"networks.{name}.widen: no network '{narrow}', {nearest(narrow, self.networks)}")
        thin = self._resolve(narrow, (*seen, name))
        if isinstance(thin, Foreign):
            raise RecipeError(f"networks.{name}.widen: {narrow} is another's network ({thin}), whose width is fixed")
        wide = thin.widened(network.by)
        return wide.model_copy(update={"normalise": network.normalise}) if network.normalise else wide

    def _instances_of(self, name: str, stage: Stage) -> Iterator[Instance]:
        option = f"stages.{name}"
        if len(set(stage.train)) < len(stage.train):
            raise RecipeError(f"{option}.train: names a network twice")
        seed = self.seed if stage.seed is None else stage.seed
        data_seed = seed if self.data.seed is None else self.data.seed
        init_file = stage.init if isinstance(stage.init, File) else None
        for network in stage.train:
            if network not in self.networks:
                raise RecipeError(f"{option}.train: no network '{network}', {nearest(network, self.networks)}")
            architecture = self.architectures[network]
            init = self._parent(f"{option}.init", stage.init, network) if isinstance(stage.init, str) else None
            teacher = self._parent(f"{option}.teacher", stage.teacher, None) if isinstance(stage, TaughtStage) else None
            yield Instance(name, network, stage, architecture, seed, data_seed, init, init_file, teacher)

    def _parent(self, option: str, reference: str, prefer: str | None) -> str:
        """The key of the instance that `reference` names: `stage/network`, or `stage` of its network `prefer`."""
        stage_name, _, network = reference.partition("/")
        if stage_name not in self.stages:
            raise RecipeError(f"{option}: no stage '{stage_name}', {nearest(stage_name, self.stages)}")
        trained = self.stages[stage_name].train
        network = network or prefer or (trained[0] if len(trained) == 1 else "")
        if not network:
            choices = ", ".join(f"{stage_name}/{name}" for name in trained)
            raise RecipeError(f"{option}: stage '{stage_name}' trains several networks, name one: {choices}")
        if network not in trained:
            choices = ", ".join(trained)
            raise RecipeError(f"{option}: stage '{stage_name}' does not train network '{network}' but {choices}")
        return f"{stage_name}/{network}"


def _check_ramp(instance: Instance, data: Data) -> None:
    """Raises RecipeError if the data does not allow the stage's progressive resizing."""
    ramp, option = instance.stage.ramp, f"stages.{instance.stage_name}.ramp"
    if ramp and data.augment.crop is None:
        raise RecipeError(f"{option}: needs data.augment.crop, which is not set")
    for key in ("end_px", "start_px"):
        if ramp and (getattr(ramp, key) or 0) > data.resolution:
            raise RecipeError(f"{option}.{key}: {getattr(ramp, key)} is more than the resolution {data.resolution}")


def _without_tags(keys: list[int | str]) -> list[int | str]:
    """The keys, as in the YAML file, that lead to a fault.

    pydantic inserts the tag of a union's member behind the member's name: ("stages", "distill", "kl", "epochs"), and
    once more for the union below `init`: ("stages", "distill", "kl", "init", "file", "path").
    """
    if keys[0] in ("networks", "stages") and len(keys) > 2 and keys[2] != "[key]":
        del keys[2]
        if keys[2:3] == ["init"]:
            del keys[3:4]
    return keys


def load_recipe(path: str | Path, overrides: Sequence[str] = (), networks: str | Path | None = None) -> Recipe:
    """The checked recipe in a YAML file, with overrides `dotted.key=value` applied.

    networks: the Python file of the user's own networks. Raises RecipeError: one line with the file, the dotted key and
    what to write instead.
    """
    code = read_code(Path(networks)) if networks else None
    recipe = validate(Recipe, read_yaml(Path(path), overrides), str(path), _without_tags, context=code)
    try:
        _ = recipe.instances  # checks the graph
        _ = recipe.code
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe


def load_seeds(
    path: str | Path, overrides: Sequence[str], seeds: Sequence[int], networks: str | Path | None = None
) -> list[Recipe]:
    """A recipe for each seed; none: the recipe as it is. A run of another seed than the recipe's is `NAME-SEED`.

    Stages that teach, and those that they start from, keep the recipe's seed unless they have one of their own, so that
    all runs share the teacher.
    """
    recipe = load_recipe(path, overrides, networks)
    if not seeds:
        return [recipe]
    instances = recipe.instances
    teachers = {instance.teacher for instance in instances.values() if instance.teacher}
    shared = {instances[key].stage_name for key in (recipe.select(teachers) if teachers else {})}
    keep = [f"stages.{name}.seed={recipe.seed}" for name in shared if recipe.stages[name].seed is None]
    return [
        load_recipe(
            path, [*overrides, *keep, f"seed={seed}", f"name={run_of_seed(recipe.name, recipe.seed, seed)}"], networks
        )
        for seed in seeds
    ]


def run_of_seed(name: str, own_seed: int | None, seed: int) -> str:
    """The name of the run of a seed, where the recipe's own seed has the run `name`."""
    return name if seed == own_seed else f"{name}-{seed}"
