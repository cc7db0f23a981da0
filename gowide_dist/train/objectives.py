"""What a stage minimises. An objective is one module that owns everything trainable; the teacher stands outside it.

Shapes: B images, C channels, H = W pixels, K classes. An objective called with images [B, 3, H, H] and labels [B] gives
scalars by name, `loss` among them; `evaluate` gives losses and accuracies of every sample by name: [B] each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self, cast

import torch
from torch import Tensor, nn

from gowide_dist.networks.resnet import ResNet
from gowide_dist.networks.teacher import Teacher
from gowide_dist.networks.transforms import linear_transform, merged
from gowide_dist.recipe import BlocksStage, KlStage, LabelsStage
from gowide_dist.train.losses import accuracy, block_mse, cross_entropy, kl_divergence, mixup_lam
from gowide_dist.train.teacher_logits import TeacherOutput, merge_tail


class Objective(nn.Module, ABC):
    """A student and the loss that trains it, in `num_phases` phases that each train a part of their own."""

    num_phases = 1

    def __init__(self, student: ResNet) -> None:
        super().__init__()
        self.student = student

    @abstractmethod
    def losses(
        self, images: Tensor, labels: Tensor, stored: TeacherOutput | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of each sample by name, [B] each, and the logits [B, K]. `stored`: what the teacher says, if known."""

    def begin_phase(self, phase: int) -> None:
        """Make exactly what phase `phase` trains require gradients and, in training, move statistics."""

    def forward(
        self, images: Tensor, labels: Tensor, step: int = 0, stored: TeacherOutput | None = None
    ) -> dict[str, Tensor]:
        """Losses by name, averaged over the batch; `loss` is the one to minimise. `step` keys what is random."""
        losses, _ = self.losses(images, labels, stored)
        return _means(losses)

    def evaluate(self, images: Tensor, labels: Tensor, stored: TeacherOutput | None = None) -> dict[str, Tensor]:
        """Losses and accuracies of each sample by name, [B] each."""
        losses, logits = self.losses(images, labels, stored)
        return {**losses, **accuracy(logits, labels)}

    def finished(self) -> ResNet:
        """The network that the stage leaves behind."""
        return self.student


class Labels(Objective):
    """Cross-entropy on the labels, in training with label smoothing and mixup."""

    def __init__(self, student: ResNet, label_smoothing: float = 0.0, mixup: float = 0.0, seed: int = 0) -> None:
        super().__init__(student)
        self.label_smoothing, self.mixup, self.seed = label_smoothing, mixup, seed

    def forward(
        self, images: Tensor, labels: Tensor, step: int = 0, stored: TeacherOutput | None = None
    ) -> dict[str, Tensor]:
        """`loss`: the cross-entropy. With mixup each image is mixed with its neighbour in this process's batch."""
        if not self.mixup:
            logits, _ = self.student(images)
            return {"loss": cross_entropy(logits, labels, self.label_smoothing).mean()}
        share = mixup_lam(self.mixup, self.seed, step)
        logits, _ = self.student(share * images + (1 - share) * images.roll(1, dims=0))
        mine, neighbours = (cross_entropy(logits, whose, self.label_smoothing) for whose in (labels, labels.roll(1)))
        return {"loss": (share * mine + (1 - share) * neighbours).mean()}

    def losses(
        self, images: Tensor, labels: Tensor, stored: TeacherOutput | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`loss`: the plain cross-entropy."""
        logits, _ = self.student(images)
        return {"loss": cross_entropy(logits, labels)}, logits


class Kl(Objective):
    """Distillation of the teacher's output, mixed with cross-entropy on the labels where these have a weight.

    Without a teacher, what it says of every batch must be stored.
    """

    def __init__(
        self, student: ResNet, teacher: Teacher | None, temperature: float = 1.0, labels_weight: float = 0.0
    ) -> None:
        super().__init__(student)
        self.teacher, self.temperature, self.labels_weight = teacher, temperature, labels_weight

    def losses(
        self, images: Tensor, labels: Tensor, stored: TeacherOutput | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`loss`: (1 - labels_weight) times the KL divergence at the temperature, labels_weight times cross-entropy."""
        logits, _ = self.student(images)
        if stored is None:
            assert self.teacher is not None
            stored = TeacherOutput(self.teacher.logits(images))
        kl = kl_divergence(merge_tail(logits, stored.classes, self.temperature), stored.values, self.temperature)
        if not self.labels_weight:
            return {"loss": kl}, logits
        from_labels = cross_entropy(logits, labels)
        loss = (1 - self.labels_weight) * kl + self.labels_weight * from_labels
        return {"loss": loss, "kl": kl, "cross_entropy": from_labels}, logits


class Blocks(Objective):
    """Imitation of the teacher's block outputs.

    Bottom-up there is a phase for each block, which trains that block alone (with `trained_prefix`, those below it
    too) and runs neither student nor teacher above it. Jointly, one phase trains all blocks in one pass.

    While it trains, a block works on what the student's blocks below it put out, which stay as they are unless
    `trained_prefix`; or with `teacher_inputs`, on the teacher's output below it, so that no block waits for another.
    Where the channels differ, linear transforms stand between (see `transforms`).

    The classifier is the teacher's, unless `fresh_classifier`, so that the student can be judged right after.
    """

    def __init__(
        self,
        student: ResNet,
        teacher: Teacher,
        *,
        joint: bool = False,
        teacher_inputs: bool = False,
        trained_prefix: bool = False,
        fresh_classifier: bool = False,
    ) -> None:
        super().__init__(student)
        self.teacher = teacher
        self.joint, self.teacher_inputs, self.trained_prefix = joint, teacher_inputs, trained_prefix
        self.num_phases = 1 if joint else student.num_blocks
        channels = list(zip(student.architecture.block_channels, teacher.block_channels, strict=True))
        self.up = nn.ModuleList(linear_transform(mine, theirs) for mine, theirs in channels)
        self.down = nn.ModuleList(linear_transform(theirs, mine) for mine, theirs in channels[:-1])
        self.to(student.fc.weight)
        self.classifier = None if fresh_classifier else teacher.copy_of_classifier()
        self.begin_phase(0)

    def begin_phase(self, phase: int) -> None:
        """Train block `phase`, or jointly all blocks."""
        num_blocks = self.student.num_blocks
        self._targets = range(num_blocks) if self.joint else range(phase, phase + 1)
        trained = range(self._targets.stop) if self.trained_prefix else self._targets
        self._trained = [part for index in trained for part in self._parts(index)]
        self.requires_grad_(False)
        for part in self._trained:
            part.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode for what this phase trains, eval mode for the rest."""
        super().train(False)
        self.training = mode
        for part in self._trained:
            part.train(mode)
        return self

    def forward(
        self, images: Tensor, labels: Tensor, step: int = 0, stored: TeacherOutput | None = None
    ) -> dict[str, Tensor]:
        """`loss`: the sum of the errors of the blocks that are trained on, `mse_block1` and so on from the bottom."""
        targets = self.teacher.blocks(images, self._targets.stop)
        errors = {}
        if self.teacher_inputs:
            for index in self._targets:
                x = self._block(index, images if index == 0 else targets[index - 1])
                errors[f"mse_block{index + 1}"] = block_mse(x, targets[index])
        else:
            x = images
            for index in range(self._targets.stop):
                with torch.set_grad_enabled(self.trained_prefix or index in self._targets):
                    x = self._block(index, x if self.trained_prefix else x.detach())
                if index in self._targets:
                    errors[f"mse_block{index + 1}"] = block_mse(x, targets[index])
        return _means(_with_sum(errors))

    def losses(
        self, images: Tensor, labels: Tensor, stored: TeacherOutput | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The error of every block when the student runs on its own, and `loss`, their sum."""
        errors = {}
        x = images
        for index, target in enumerate(self.teacher.blocks(images, self.student.num_blocks)):
            last = self.student.block(index, x if index == 0 else self.down[index - 1](x))
            x = self.up[index](last)
            errors[f"mse_block{index + 1}"] = block_mse(x, target)
        logits = self.student.head(last) if self.classifier is None else self.classifier(self.student.pool(x))
        return _with_sum(errors), logits

    def finished(self) -> ResNet:
        """The plain student, its transforms and classifier merged into it."""
        return merged(self.student, list(self.up), list(self.down), self.classifier)

    def _block(self, index: int, x: Tensor) -> Tensor:
        """Output of student block `index` with the teacher's channels, for what has the teacher's channels below it."""
        x = self.student.block(index, x if index == 0 else self.down[index - 1](x))
        return cast(Tensor, self.up[index](x))

    def _parts(self, index: int) -> list[nn.Module]:
        """What is trained with block `index`: itself and the transforms around it."""
        parts = [*self.student.block_modules(index), self.up[index]]
        return parts if index == 0 else [self.down[index - 1], *parts]


def build_objective(
    stage: LabelsStage | BlocksStage | KlStage, student: ResNet, teacher: Teacher | None, seed: int
) -> Objective:
    """The objective that a stage of the recipe describes, over `student`. No teacher: its logits are stored."""
    match stage:
        case LabelsStage():
            return Labels(student, stage.label_smoothing, stage.mixup, seed)
        case KlStage():
            return Kl(student, teacher, stage.temperature, stage.labels_weight)
        case BlocksStage():
            assert teacher is not None
            return Blocks(
                student,
                teacher,
                joint=stage.order == "joint",
                teacher_inputs=stage.inputs == "teacher",
                trained_prefix=stage.prefix == "trained",
                fresh_classifier=stage.classifier == "fresh",
            )


def _means(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.mean() for name, values in losses.items()}


def _with_sum(errors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": torch.stack(list(errors.values())).sum(dim=0), **errors}
