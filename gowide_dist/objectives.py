"""What a stage minimises. An objective is one module that owns everything trainable; the teacher stands outside it.

Shapes: B images, C channels, H = W pixels, K classes. A loss called with images [B, 3, H, H] and labels [B] gives
scalars by name, `loss` among them; `evaluate` gives the same and the accuracies for every sample apart: [B] each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gowide_dist.networks import ResNet, Teacher
from gowide_dist.recipe import BlocksStage, KlStage, LabelsStage


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each sample: logits [B, K] twice -> [B].

    Hinton et al. 2015 (arXiv 1503.02531): T^2 keeps the gradient's size whatever the temperature.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


def block_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all entries of a block's output, for each sample: [B, C, H, H] twice -> [B].

    Zhou et al. 2020 (arXiv 2007.00811), section 3: the thin block's output against the wide one's.
    """
    return (student - teacher).square().flatten(1).mean(dim=1)


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Whether the label is the best (`top1`) or among the five best (`top5`) of each sample: 0 or 1, [B] each."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels[:, None]).float()
    return {"top1": hits[:, 0], "top5": hits.sum(dim=1)}


class Objective(nn.Module, ABC):
    """A student and the loss that trains it, in `num_phases` phases that each train a part of their own."""

    num_phases = 1

    def __init__(self, student: ResNet) -> None:
        super().__init__()
        self.student = student

    @abstractmethod
    def losses(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of each sample by name, [B] each, and the logits [B, K]."""

    def begin_phase(self, phase: int) -> None:
        """Make exactly what phase `phase` trains require gradients and, in training, move statistics."""

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses by name, averaged over the batch; `loss` is the one to minimise."""
        losses, _ = self.losses(images, labels)
        return {name: values.mean() for name, values in losses.items()}

    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses and accuracies of each sample by name, [B] each."""
        losses, logits = self.losses(images, labels)
        return {**losses, **accuracy(logits, labels)}


class Labels(Objective):
    """Cross-entropy on the labels."""

    def losses(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """`loss`: the cross-entropy."""
        logits, _ = self.student(images)
        return {"loss": F.cross_entropy(logits, labels, reduction="none")}, logits


class Kl(Objective):
    """Distillation of the teacher's output."""

    def __init__(self, student: ResNet, teacher: Teacher, temperature: float) -> None:
        super().__init__(student)
        self.teacher = teacher
        self.temperature = temperature

    def losses(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """`loss`: the KL divergence from the teacher's answer at the temperature."""
        logits, _ = self.student(images)
        return {"loss": kl_divergence(logits, self.teacher.logits(images), self.temperature)}, logits


class Blocks(Objective):
    """Imitation of the teacher's block outputs, bottom to top: a phase for each block.

    A phase trains one block on what the student's own blocks below it put out; these are frozen, in eval mode, and
    neither student nor teacher runs above the block. The classifier is the teacher's, so that the student can be
    judged by its accuracy right after.
    """

    def __init__(self, student: ResNet, teacher: Teacher) -> None:
        super().__init__(student)
        self.teacher = teacher
        self.num_phases = student.num_blocks
        student.fc.load_state_dict(teacher.classifier)
        self.begin_phase(0)

    def begin_phase(self, phase: int) -> None:
        """Train block `phase` alone."""
        self.phase = phase
        self.requires_grad_(False)
        for module in self.student.block_modules(phase):
            module.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode for the block of this phase, eval mode for the rest."""
        super().train(False)
        self.training = mode
        for module in self.student.block_modules(self.phase):
            module.train(mode)
        return self

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss`: the error of the block that is trained, also under its own name."""
        x = images
        with torch.no_grad():
            for index in range(self.phase):
                x = self.student.block(index, x)
        target = self.teacher.blocks(images, self.phase + 1)[-1]
        loss = block_mse(self.student.block(self.phase, x), target).mean()
        return {"loss": loss, f"mse_block{self.phase + 1}": loss}

    def losses(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The error of every block, and `loss`, their sum."""
        logits, blocks = self.student(images)
        targets = self.teacher.blocks(images, self.student.num_blocks)
        errors = {
            f"mse_block{index}": block_mse(block, target)
            for index, (block, target) in enumerate(zip(blocks, targets, strict=True), start=1)
        }
        return {"loss": torch.stack(list(errors.values())).sum(dim=0), **errors}, logits


def build_objective(stage: LabelsStage | BlocksStage | KlStage, student: ResNet, teacher: Teacher | None) -> Objective:
    """The objective that a stage of the recipe names, over `student`."""
    match stage:
        case LabelsStage():
            return Labels(student)
        case KlStage():
            assert teacher is not None
            return Kl(student, teacher, stage.temperature)
        case BlocksStage():
            assert teacher is not None
            return Blocks(student, teacher)
