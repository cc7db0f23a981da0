"""What stages cost, from arithmetic alone. Multiply-adds are counted once, as torchvision's tables do."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from gowide_dist.networks.architecture import Architecture, Conv
from gowide_dist.recipe import BlocksStage, Instance, KlStage, LabelsStage, Recipe, StageBase

BACKWARD = 2  # a backward pass costs two forward passes: gradients of inputs, and of weights


class MacsPerImage(NamedTuple):
    """Multiply-adds for one training image: of the student, forward and backward, and of the teacher."""

    forward: float
    backward: float
    teacher: float

    @property
    def student(self) -> float:
        """Without the teacher's."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """Of both."""
        return self.student + self.teacher


def training_macs(instance: Instance, recipe: Recipe, num_classes: int) -> MacsPerImage:
    """The cost of training on one image, averaged over the phases and, if images grow, the epochs of the stage."""
    stage, resolution = instance.stage, recipe.data.resolution
    sides = [stage.ramp.side(epoch, resolution) for epoch in range(stage.epochs)] if stage.ramp else [resolution]
    costs = [_training_macs_at(side, instance, recipe, num_classes) for side in sides or [resolution]]
    return MacsPerImage(*(fmean(values) for values in zip(*costs, strict=True)))


def _training_macs_at(resolution: int, instance: Instance, recipe: Recipe, num_classes: int) -> MacsPerImage:
    student, stage = instance.architecture, instance.stage
    teacher = recipe.instances[instance.teacher].architecture if instance.teacher else None
    if not isinstance(stage, BlocksStage):
        whole = student.macs(num_classes, resolution)
        return MacsPerImage(whole, BACKWARD * whole, teacher.macs(num_classes, resolution) if teacher else 0)
    assert teacher is not None
    between = [sum(conv.macs for conv in convs) for convs in _transforms(student, teacher, resolution)]
    forward, trained, theirs = [], [], []
    for phase in phases(stage, student):
        upto = [
            student.macs(num_classes, resolution, index) for index in (phase.runs_from, phase.trains_from, phase.stop)
        ]
        bottom, first, top = (0 if index == 0 else macs for index, macs in zip(phase[:3], upto, strict=True))
        forward.append(top - bottom + sum(between[phase.runs_from : phase.stop]))
        trained.append(top - first + sum(between[phase.trains_from : phase.stop]))
        theirs.append(teacher.macs(num_classes, resolution, phase.stop))
    return MacsPerImage(fmean(forward), BACKWARD * fmean(trained), fmean(theirs))


def _transforms(student: Architecture, teacher: Architecture, resolution: int) -> list[list[Conv]]:
    """The linear transforms around each block (see `gowide_dist.transforms`): none where the channels are equal."""
    down: list[Conv] = []
    found = []
    sizes = zip(student.block_channels, teacher.block_channels, student.block_sides(resolution), strict=True)
    for mine, theirs, side in sizes:
        up = [Conv(mine, theirs, 1, 1, side)] if mine != theirs else []
        found.append([*down, *up])
        down = [Conv(theirs, mine, 1, 1, side) for _ in up]
    return found


def with_teacher(instance: Instance) -> Instance:
    """The costs of the first student that needs answers which are then stored: those with a live teacher."""
    if not isinstance(instance.stage, KlStage):
        return instance
    return instance._replace(stage=instance.stage.model_copy(update={"teacher_logits": "live", "top_k": None}))


def without_teacher(instance: Instance) -> Instance:
    """The costs of a student for whom the answers are stored: those of training on labels."""
    kept = instance.stage.model_dump(include=set(StageBase.model_fields))
    stage = LabelsStage.model_validate({**kept, "objective": "labels", "init": None})
    return instance._replace(stage=stage, teacher=None)


class Phase(NamedTuple):
    """What a phase of imitation runs: the blocks from `runs_from` to before `stop`; it trains those from `trains_from`.

    The stem belongs to block 0.
    """

    runs_from: int
    trains_from: int
    stop: int


def phases(stage: BlocksStage, student: Architecture) -> list[Phase]:
    """The phases of an imitation, equally long."""
    if stage.order == "joint":
        return [Phase(0, 0, student.num_blocks)]
    return [
        Phase(
            index if stage.inputs == "teacher" else 0,
            0 if stage.prefix == "trained" else index,
            index + 1,
        )
        for index in range(student.num_blocks)
    ]


def validation_macs(instance: Instance, recipe: Recipe, num_classes: int) -> int:
    """Multiply-adds for one validation image, which student and teacher answer as a whole."""
    student, resolution = instance.architecture, recipe.data.resolution
    if instance.teacher is None:
        return student.macs(num_classes, resolution)
    teacher = recipe.instances[instance.teacher].architecture
    transforms = _transforms(student, teacher, resolution) if isinstance(instance.stage, BlocksStage) else []
    between = sum(conv.macs for convs in transforms for conv in convs)
    return student.macs(num_classes, resolution) + between + teacher.macs(num_classes, resolution)


class Memory(NamedTuple):
    """Bytes that a training process needs, by what needs them.

    weights: 4 bytes a parameter. gradients and momentum: 4 each, of the parameters that a phase trains. average: 4, if
    there is a moving average. activations: what the backward pass needs of the images that a process takes at a time
    (`Architecture.num_activations`), 4 bytes each or 2 in bf16 and fp16. teacher: its weights, three times its largest
    output, and the block outputs that are imitated. images: as bytes, and as the numbers that the network takes.
    loader: decoded batches that wait, in the host's memory. libraries: what PyTorch takes once it is loaded, about; its
    files, half a GB in memory that all processes of a machine share, come on top.
    """

    weights: int
    gradients: int
    momentum: int
    average: int
    activations: int
    teacher: int
    images: int
    loader: int
    libraries: int = 500_000_000

    @property
    def device(self) -> int:
        """On the device: all but what the loader holds."""
        return sum(self) - self.loader


def memory_per_process(instance: Instance, recipe: Recipe, num_classes: int, share: int, num_threads: int) -> Memory:
    """The memory of one process, which takes `share` images of each batch and decodes them in `num_threads` threads."""
    student, stage, side = instance.architecture, instance.stage, recipe.data.resolution
    size = 4 if recipe.precision == "float32" else 2
    optim = stage.optim
    at_once = share // (optim.accumulate if optim else 1)
    weights = student.num_parameters(num_classes)
    trained, kept, targets = weights, student.num_activations(side), 0
    teacher = recipe.instances[instance.teacher].architecture if instance.teacher else None
    if teacher and isinstance(stage, BlocksStage):
        between = _transforms(student, teacher, side)
        theirs = [sum(conv.in_channels * conv.out_channels for conv in convs) for convs in between]
        written = [sum(conv.num_outputs for conv in convs) for convs in between]
        parts = phases(stage, student)
        trained = max(
            _of_blocks(phase, lambda count: student.num_parameters(num_classes, count) + sum(theirs[:count]))
            for phase in parts
        )
        kept = max(
            _of_blocks(phase, lambda count: student.num_activations(side, count) + sum(written[:count]))
            for phase in parts
        )
        weights += sum(theirs)
        outputs = zip(teacher.block_channels, teacher.block_sides(side), strict=True)
        targets = sum(channels * block_side**2 for channels, block_side in outputs)
    answers = at_once * size * (3 * teacher.largest_activation(side) + targets) if teacher else 0
    pixels = 3 * side**2
    return Memory(
        weights=4 * weights,
        gradients=4 * trained if stage.epochs else 0,
        momentum=4 * trained if optim and optim.momentum else 0,
        average=4 * weights if optim and optim.ema else 0,
        activations=size * at_once * kept if stage.epochs else 0,
        teacher=(4 * teacher.num_parameters(num_classes) if teacher else 0) + answers,
        images=share * pixels * (1 + 4),
        loader=2 * (num_threads + 3) * share * pixels,  # of training and of validation
    )


def _of_blocks(phase: Phase, upto: Callable[[int], int]) -> int:
    """Of the blocks that a phase trains; `upto` counts the stem and the first so many blocks."""
    return upto(phase.stop) - (upto(phase.trains_from) if phase.trains_from else 0)


class Spent(NamedTuple):
    """What has gone into a network, over its stage and those that it started from; not into its teacher's training."""

    epochs: int
    images: int
    macs: float


def spent(key: str, recipe: Recipe, num_classes: int, images_per_epoch: int) -> Spent:
    """Student epochs, images and multiply-adds up to the end of instance `key`, teacher's answers included.

    Also where these were stored: they are counted for every student, as if it had asked.
    """
    instance = recipe.instances[key]
    images = instance.stage.epochs * images_per_epoch
    before = spent(instance.init, recipe, num_classes, images_per_epoch) if instance.init else Spent(0, 0, 0.0)
    macs = images * training_macs(instance, recipe, num_classes).total
    return Spent(before.epochs + instance.stage.epochs, before.images + images, before.macs + macs)
