"""Recipes: what to train, as data. Networks by name, stages by name, a graph by reference.

A recipe is checked as a whole before anything is spent; what depends on files (class counts, a teacher in a file)
is checked by `pipeline`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from gowide_dist.errors import RecipeError
from gowide_dist.networks.architecture import Architecture
from gowide_dist.schema import (
    Count,
    Fraction,
    Frozen,
    Name,
    Natural,
    NonNegative,
    Positive,
    Seed,
    apply_override,
    nearest,
    read_yaml,
    validate,
)


class RandomCrop(Frozen):
    """A random part of the image, resized: torchvision's RandomResizedCrop, with its defaults."""

    scale: tuple[Positive, Positive] = (0.08, 1.0)  # least and greatest part of the area
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # width over height

    @model_validator(mode="after")
    def _check(self) -> RandomCrop:
        if not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale: should be [least, greatest] part of the area, at most 1")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError("ratio: should be [least, greatest] width over height")
        return self


class Augment(Frozen):
    """Random changes to training images, each a function of (seed, epoch, sample index)."""

    flip: bool = False
    translate: Natural = 0  # px, in each direction
    crop: RandomCrop | None = None


class Data(Frozen):
    """The FFCV files; `dataset.json` lies beside them."""

    train: Path
    val: Path
    resolution: Count  # px
    classes: Count | None = None  # checked against dataset.json, which says it otherwise
    augment: Augment = Augment()
    center_crop: Annotated[Fraction, Field(gt=0)] | None = None  # side of a validation crop over the shorter side
    order: Literal["random", "quasi-random"] = "random"  # quasi-random: for files larger than memory
    seed: Seed | None = None  # of order and augmentation, where it is not the stage's: one stream for several seeds

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.augment.translate >= self.resolution:
            raise ValueError(f"augment.translate: {self.augment.translate} px shift {self.resolution} px out of sight")
        return self


class Widened(Frozen):
    """Another network of the recipe with `by` times as wide 3x3 filters."""

    widen: Name
    by: Positive


def _kind_of_network(value: Any) -> str:
    is_widened = isinstance(value, Widened) or (isinstance(value, Mapping) and "widen" in value)
    return "widened" if is_widened else "architecture"


Network = Annotated[
    Annotated[Architecture, Tag("architecture")] | Annotated[Widened, Tag("widened")],
    Discriminator(_kind_of_network),
]


class Optim(Frozen):
    """Stochastic gradient descent. `lr` is the peak of the schedule."""

    lr: Positive
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    decay_norms: bool = True  # whether weight decay also holds for batch norms and biases
    clip_norm: Positive | None = None  # greatest norm of the whole gradient
    accumulate: Count = 1  # parts in which a process takes its share of a batch, where memory is short
    ema: Fraction | None = None  # decay per step of the moving average of weights that is evaluated and kept

    @model_validator(mode="after")
    def _check(self) -> Optim:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum")
        for name in ("momentum", "ema"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} of 1 never moves; it should be less")
        return self


class Schedule(Frozen):
    """The learning rate over a stage: a linear warm-up, then a decay. `cosine` stands for `{decay: cosine}`.

    Under bottom-up imitation every block has a schedule of its own.
    """

    decay: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    milestones: tuple[Positive, ...] = ()  # epochs; with decay: step, the rate is multiplied by `factor` at each
    factor: Fraction = 0.1

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        if isinstance(values, str):
            return {"decay": values}
        if isinstance(values, Mapping) and "milestones" in values and "decay" not in values:
            return {"decay": "step", **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if bool(self.milestones) != (self.decay == "step"):
            raise ValueError("decay: step and milestones need each other")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones should increase")
        return self


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class File(Frozen):
    """Weights in a file: a .safetensors, or a state dict as torchvision publishes them (.pth)."""

    file: Path


Reference = Annotated[str, Field(strict=True)]  # `stage` or `stage/network`
Start = Annotated[
    Annotated[Reference, Tag("stage")] | Annotated[File, Tag("file")],
    Discriminator(lambda value: "file" if isinstance(value, File | Mapping) else "stage"),
]


class Ramp(Frozen):
    """Training images that grow, from `start_px` to the data's resolution, which they first have in `until_epoch`.

    Between, the side grows evenly, in steps of 32 px. Validation images always have the full resolution.
    """

    start_px: Count
    until_epoch: Count

    def side(self, epoch: int, resolution: int) -> int:
        """Side in px of the training images of an epoch."""
        if epoch >= self.until_epoch:
            return resolution
        growth = (resolution - self.start_px) * epoch / self.until_epoch
        return min(resolution, self.start_px + 32 * round(growth / 32))


class StageBase(Frozen):
    """What all stages have in common. One instance runs for each network in `train`."""

    train: Annotated[tuple[Name, ...], BeforeValidator(_listed), Field(min_length=1)]
    init: Start | None = None  # a stage, whose weights of the same network it starts from, or a file
    epochs: Natural  # 0 takes the weights of `init` as they are
    optim: Optim | None = None  # needed to train
    schedule: Schedule = Schedule()
    ramp: Ramp | None = None  # progressive resizing; needs data.augment.crop
    seed: Seed | None = None  # of this stage, where it is not the recipe's: a teacher shared by several seeds

    @model_validator(mode="after")
    def _check_epochs(self) -> StageBase:
        if self.epochs and self.optim is None:
            raise ValueError("optim is required to train")
        if not self.epochs and self.init is None:
            raise ValueError("epochs: 0 takes the weights of init, which is missing")
        return self


class LabelsStage(StageBase):
    """Cross-entropy on the labels."""

    objective: Literal["labels"]
    label_smoothing: Fraction = 0.0
    mixup: NonNegative = 0.0  # alpha of the Beta distribution that mixes pairs of images; 0 mixes none


class TaughtStage(StageBase):
    """What stages with a teacher have in common."""

    teacher: Reference
    start: Literal["teacher", "fresh"] = "fresh"  # teacher: from every weight of its that fits: same name, same shape

    @model_validator(mode="after")
    def _check_start(self) -> TaughtStage:
        if self.start == "teacher" and self.init is not None:
            raise ValueError("start: teacher and init both say which weights the stage starts from; keep one of them")
        return self


class Phase(NamedTuple):
    """What a phase of an imitation runs and trains, as blocks of the student; the stem belongs to block 0."""

    runs: range  # forward: the lowest ones only where they feed those that train
    trains: range  # backward
    targets: range  # compared with the teacher's


class BlocksStage(TaughtStage):
    """Imitation of the teacher's block outputs: mean squared errors, one for each block.

    The paper leaves open what these options say; see docs/method.md.
    """

    objective: Literal["blocks"]
    order: Literal["bottom-up", "joint"] = "bottom-up"  # bottom-up: each block in its equal share of the epochs
    inputs: Literal["student", "teacher"] = "student"  # whose lower block's output a block works on while it trains
    prefix: Literal["frozen", "trained"] = "frozen"  # whether a block's error also trains the blocks below it
    classifier: Literal["teacher", "fresh"] = "teacher"

    def phases(self, num_blocks: int) -> list[Phase]:
        """The phases of the stage, equally long: one for each block bottom-up, one for all blocks jointly."""
        if self.order == "joint":
            return [Phase(*[range(num_blocks)] * 3)]
        return [
            Phase(
                range(index if self.inputs == "teacher" else 0, index + 1),
                range(0 if self.prefix == "trained" else index, index + 1),
                range(index, index + 1),
            )
            for index in range(num_blocks)
        ]

    @model_validator(mode="after")
    def _check_prefix(self) -> BlocksStage:
        if self.prefix == "trained" and self.inputs == "teacher":
            raise ValueError("prefix: trained needs inputs: student, for on the teacher's inputs a block has no prefix")
        return self


class KlStage(TaughtStage):
    """Distillation of the teacher's output: KL divergence at a temperature, mixed with cross-entropy on the labels."""

    objective: Literal["kl"]
    temperature: Positive = 1.0
    labels_weight: Fraction = 0.0  # part of the cross-entropy; the KL divergence has the rest
    teacher_logits: Literal["live", "stored"] = "live"  # stored: once for all stages with this teacher and this stream
    top_k: Count | None = None  # of stored logits: the best classes, the others' mass in one number; default: all

    @model_validator(mode="after")
    def _check_top_k(self) -> KlStage:
        if self.top_k and self.teacher_logits == "live":
            raise ValueError("top_k: needs teacher_logits: stored; a live teacher gives all classes")
        return self


Stage = Annotated[LabelsStage | BlocksStage | KlStage, Field(discriminator="objective")]


class Checkpoints(Frozen):
    """When the training state is saved, and how many of the newest are kept."""

    every_minutes: Positive | None = 10.0
    every_steps: Count | None = None
    keep: Count = 2


class Instance(NamedTuple):
    """One stage for one network: what runs, is stored and is fingerprinted. `key` is `stage/network`.

    What is to be trained is said here; elsewhere, of the same instance: `StageDir` is its folder, `Done` its result,
    `StagePlan` its expected cost, `StageStatus` its progress and its job, `Result` its row in a report.
    """

    stage_name: str
    network_name: str
    stage: LabelsStage | BlocksStage | KlStage
    architecture: Architecture
    seed: int
    data_seed: int  # of the stream: order and augmentation
    init: str | None
    init_file: Path | None
    teacher: str | None

    @property
    def key(self) -> str:
        """`stage/network`, its name on the command line and its folder under `stages/`."""
        return f"{self.stage_name}/{self.network_name}"

    @property
    def parents(self) -> tuple[str, ...]:
        """The instances whose weights this one needs."""
        return tuple(dict.fromkeys(key for key in (self.init, self.teacher) if key))


class Recipe(Frozen):
    """An experiment. The weights depend on all but `name`, `log_every_steps`, `eval_every_epochs` and `checkpoints`."""

    name: Name
    seed: Seed = 0
    data: Data
    batch_size: Count  # global, whatever the number of processes
    networks: dict[Name, Network] = Field(min_length=1)
    stages: dict[Name, Stage] = Field(min_length=1)
    precision: Literal["float32", "bf16", "fp16"] = "float32"  # of the convolutions; weights stay float32
    compile: bool = False  # by torch.compile
    sync_batch_norm: bool = False  # statistics over all processes' images; if several, on GPUs only
    log_every_steps: Count = 50
    eval_every_epochs: Count = 1
    checkpoints: Checkpoints = Checkpoints()

    @cached_property
    def architectures(self) -> dict[str, Architecture]:
        """Every network, derived ones resolved. Raises RecipeError on a bad reference."""
        return {name: self._resolve(name, ()) for name in self.networks}

    @cached_property
    def instances(self) -> dict[str, Instance]:
        """The graph of stage instances, parents before children. Raises RecipeError if it is none."""
        found = {
            instance.key: instance
            for name, stage in self.stages.items()
            for instance in self._instances_of(name, stage)
        }
        for instance in found.values():
            _check_parents(instance, found)
            _check_ramp(instance, self.data)
        return {key: found[key] for key in _in_order({key: found[key].parents for key in found})}

    def select(self, stages: Iterable[str]) -> dict[str, Instance]:
        """The named instances (`stage` or `stage/network`) and all that they need, in order."""
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
        """Raises RecipeError if the global batch cannot be shared equally."""
        if self.batch_size % num_processes:
            raise RecipeError(
                f"batch_size: {self.batch_size} cannot be shared equally by {num_processes} processes; "
                f"take a multiple of {num_processes}"
            )
        share = self.batch_size // num_processes
        for name, stage in self.stages.items():
            if stage.optim and share % stage.optim.accumulate:
                raise RecipeError(
                    f"stages.{name}.optim.accumulate: the {share} images of a process cannot be cut into "
                    f"{stage.optim.accumulate} equal parts"
                )

    def _resolve(self, name: str, seen: tuple[str, ...]) -> Architecture:
        network = self.networks[name]
        if isinstance(network, Architecture):
            return network
        if network.widen in (*seen, name):
            raise RecipeError(
                f"networks.{name}.widen: goes round in a circle: {' -> '.join((*seen, name, network.widen))}"
            )
        if network.widen not in self.networks:
            raise RecipeError(
                f"networks.{name}.widen: no network '{network.widen}', {nearest(network.widen, list(self.networks))}"
            )
        return self._resolve(network.widen, (*seen, name)).widened(network.by)

    def _instances_of(self, name: str, stage: LabelsStage | BlocksStage | KlStage) -> Iterator[Instance]:
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

    def _parent(self, place: str, reference: str, prefer: str | None) -> str:
        """The key of the instance that `reference` (`stage` or `stage/network`) names."""
        stage_name, _, network = reference.partition("/")
        if stage_name not in self.stages:
            raise RecipeError(f"{place}: no stage '{stage_name}', {nearest(stage_name, list(self.stages))}")
        trained = self.stages[stage_name].train
        network = network or prefer or (trained[0] if len(trained) == 1 else "")
        if not network:
            choices = ", ".join(f"{stage_name}/{name}" for name in trained)
            raise RecipeError(f"{place}: stage '{stage_name}' trains several networks, name one: {choices}")
        if network not in trained:
            raise RecipeError(
                f"{place}: stage '{stage_name}' does not train network '{network}' but {', '.join(trained)}"
            )
        return f"{stage_name}/{network}"


def _check_parents(instance: Instance, instances: Mapping[str, Instance]) -> None:
    """Raises RecipeError unless the weights of the parents fit."""
    mine = instance.architecture
    place = f"stages.{instance.stage_name}"
    if instance.init and instances[instance.init].architecture != mine:
        raise RecipeError(
            f"{place}.init: {instance.init} has another architecture than network '{instance.network_name}'"
        )
    stage = instance.stage
    if not isinstance(stage, TaughtStage):
        return
    assert instance.teacher is not None, "a stage that is taught names its teacher"
    theirs = instances[instance.teacher].architecture
    if isinstance(stage, BlocksStage) and (mine.num_blocks, mine.stem) != (theirs.num_blocks, theirs.stem):
        raise RecipeError(
            f"{place}.teacher: {instance.teacher} ({theirs.num_blocks} blocks, {theirs.stem} stem) and network "
            f"'{instance.network_name}' ({mine.num_blocks} blocks, {mine.stem} stem) have no blocks in common"
        )
    if stage.start == "teacher" and (mine.stem, mine.stem_channels) != (theirs.stem, theirs.stem_channels):
        raise RecipeError(
            f"{place}.start: the stem of {instance.teacher} ({theirs.stem}, {theirs.stem_channels} channels) does not "
            f"fit network '{instance.network_name}' ({mine.stem}, {mine.stem_channels}); start fresh, or thin its width"
        )


def _check_ramp(instance: Instance, data: Data) -> None:
    """Raises RecipeError unless images can be made to grow as the stage asks."""
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
    """Keys with parents before children, otherwise as written. Raises RecipeError on a cycle."""
    ordered: list[str] = []
    waiting = list(parents)
    while waiting:
        ready = [key for key in waiting if all(parent in ordered for parent in parents[key])]
        if not ready:
            raise RecipeError(f"stages: {', '.join(waiting)} wait for each other in a circle")
        ordered += ready[:1]
        waiting.remove(ready[0])
    return ordered


def _dotted(location: tuple[int | str, ...]) -> str:
    """pydantic's location without the tags of unions that it inserts."""
    parts = [str(part) for part in location]
    if parts[:1] in (["networks"], ["stages"]) and len(parts) > 2 and parts[2] != "[key]":
        del parts[2]
        if parts[2:3] == ["init"]:
            del parts[3:4]
    return ".".join(part for part in parts if part != "[key]")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe in a YAML file, with `dotted.path=value` overrides applied.

    Raises RecipeError: one line with the file, the dotted place and what to write instead.
    """
    values = read_yaml(Path(path))
    for override in overrides:
        apply_override(values, override)
    recipe = validate(Recipe, values, str(path), _dotted)
    try:
        _ = recipe.instances
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe
