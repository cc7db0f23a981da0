"""What stages cost, from arithmetic alone. Multiply-adds are counted once, as torchvision's tables do."""

from __future__ import annotations

from statistics import fmean
from typing import NamedTuple

from gowide_dist.recipe import BlocksStage, Instance, LabelsStage, Recipe

BACKWARD = 2  # a backward pass costs two forward passes: gradients of inputs, and of weights


class MacsPerImage(NamedTuple):
    """Multiply-adds for one training image: of the student, forward and backward, and of the teacher."""

    student: float
    teacher: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.student + self.teacher


def training_macs(instance: Instance, recipe: Recipe, num_classes: int) -> MacsPerImage:
    """The cost of training on one image, averaged over the phases and, if images grow, the epochs of the stage."""
    stage, resolution = instance.stage, recipe.data.resolution
    if stage.ramp is None:
        return _training_macs_at(resolution, instance, recipe, num_classes)
    sides = [stage.ramp.side(epoch, resolution) for epoch in range(stage.epochs)]
    costs = [_training_macs_at(side, instance, recipe, num_classes) for side in sides]
    return MacsPerImage(fmean(cost.student for cost in costs), fmean(cost.teacher for cost in costs))


def _training_macs_at(resolution: int, instance: Instance, recipe: Recipe, num_classes: int) -> MacsPerImage:
    student, stage = instance.architecture, instance.stage
    whole = student.macs(num_classes, resolution)
    if instance.teacher is None or isinstance(stage, LabelsStage):
        return MacsPerImage((1 + BACKWARD) * whole, 0)
    teacher = recipe.instances[instance.teacher].architecture
    if not isinstance(stage, BlocksStage):
        return MacsPerImage((1 + BACKWARD) * whole, teacher.macs(num_classes, resolution))
    num_blocks = student.num_blocks
    upto = [student.macs(num_classes, resolution, index) for index in range(1, num_blocks + 1)]
    teacher_upto = [teacher.macs(num_classes, resolution, index) for index in range(1, num_blocks + 1)]
    if stage.order == "joint":
        return MacsPerImage((1 + BACKWARD) * upto[-1], teacher_upto[-1])
    below = [0, *upto[:-1]]
    mine = [top - bottom for top, bottom in zip(upto, below, strict=True)]
    if stage.inputs == "teacher":
        trained = [(1 + BACKWARD) * block for block in mine]
    elif stage.prefix == "trained":
        trained = [(1 + BACKWARD) * top for top in upto]
    else:
        trained = [bottom + (1 + BACKWARD) * block for bottom, block in zip(below, mine, strict=True)]
    return MacsPerImage(sum(trained) / num_blocks, sum(teacher_upto) / num_blocks)


class Spent(NamedTuple):
    """What has gone into a network, over its stage and those that it started from; not into its teacher's training."""

    epochs: int
    images: int
    macs: float


def spent(key: str, recipe: Recipe, num_classes: int, images_per_epoch: int) -> Spent:
    """Student epochs, images and multiply-adds up to the end of instance `key`, teacher's answers included."""
    instance = recipe.instances[key]
    images = instance.stage.epochs * images_per_epoch
    before = spent(instance.init, recipe, num_classes, images_per_epoch) if instance.init else Spent(0, 0, 0.0)
    macs = images * training_macs(instance, recipe, num_classes).total
    return Spent(before.epochs + instance.stage.epochs, before.images + images, before.macs + macs)
