"""What a stage minimises. An objective is one module that owns everything trainable; the teacher stands outside it.

To add one: its settings as a stage model in `stages` (and in the union `Stage` there), its formula in `losses`, a class
and a case of `build_objective` here. Phases, costs, restarts and reports follow from these; stored outputs are for
`KlStage` alone (`start`), and what a recipe may not combine is checked in `recipe`. It must run on the meta device,
where costs are counted: no `.item()`, no tensor made on the CPU (tests/train/test_devices.py). Another loss on the
logits is no objective: it is a case of `Kl`, and a word of `KlStage.loss`.

Shapes: B images, C channels, H = W pixels, K classes. An objective called with images [B, 3, H, H] and labels [B], or
mixed images and `MixedLabels`, gives scalars by name, `loss` among them; `evaluate`, of images that are never mixed,
gives losses and accuracies of every sample by name: [B] each. `stored` is the teacher's output for the batch, where the
stage reads it from disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self, cast

import torch
from torch import Tensor, nn

from gowide_dist.networks.network import Network
from gowide_dist.networks.quantised import Quantised
from gowide_dist.networks.teacher import Teacher
from gowide_dist.networks.transforms import linear_transform, merged
from gowide_dist.stages import BlocksStage, KlStage, LabelsStage, LogitsStage, Stage
from gowide_dist.train.losses import (
    Targets,
    accuracy,
    block_mse,
    cross_entropy,
    dist_over_batch,
    dist_over_classes,
    dkd,
    kl_divergence,
    z_scores,
)
from gowide_dist.train.teacher_logits import TeacherOutput, merge_tail

Losses = dict[str, Tensor]  # by name


class Objective(nn.Module, ABC):
    """A student and its loss, in `num_phases` phases, each of which trains its own subset of the parameters."""

    num_phases = 1

    def __init__(self, student: Network) -> None:
        super().__init__()
        self.student = student

    @abstractmethod
    def losses(self, images: Tensor, labels: Targets, stored: TeacherOutput | None = None) -> tuple[Losses, Tensor]:
        """Losses of each sample by name, [B] each, and the logits [B, K]."""

    def begin_phase(self, phase: int) -> None:
        """Let exactly what phase `phase` trains require gradients and, in training mode, update statistics."""

    def forward(self, images: Tensor, labels: Targets, stored: TeacherOutput | None = None) -> Losses:
        """Losses by name, averaged over the batch; `loss` is the one to minimise."""
        losses, _ = self.losses(images, labels, stored)
        return _means(losses)

    def evaluate(self, images: Tensor, labels: Targets, stored: TeacherOutput | None = None) -> Losses:
        """Losses and accuracies of each sample by name, [B] each."""
        assert isinstance(labels, Tensor), "evaluation is never mixed"
        losses, logits = self.losses(images, labels, stored)
        return {**losses, **accuracy(logits, labels)}

    def finished(self) -> Network:
        """The network that the stage leaves behind."""
        return self.student


class Labels(Objective):
    """Cross-entropy on the labels, in training with label smoothing and weights of the classes [K]."""

    def __init__(self, student: Network, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        super().__init__(student)
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def forward(self, images: Tensor, labels: Targets, stored: TeacherOutput | None = None) -> Losses:
        """`loss`: the cross-entropy."""
        logits, _ = self.student(images)
        return {"loss": cross_entropy(logits, labels, self.label_smoothing, self.class_weights).mean()}

    def losses(self, images: Tensor, labels: Targets, stored: TeacherOutput | None = None) -> tuple[Losses, Tensor]:
        """`loss`: the plain cross-entropy."""
        logits, _ = self.student(images)
        return {"loss": cross_entropy(logits, labels)}, logits


class Kl(Objective):
    """Distillation of the teacher's logits, mixed with cross-entropy and block errors where these have a weight.

    Without a teacher, its output must come with every batch. class_weights [K]: of the cross-entropy in training.
    """

    def __init__(
        self, student: Network, teacher: Teacher | None, stage: KlStage, class_weights: Tensor | None = None
    ) -> None:
        super().__init__(student)
        self.teacher, self.stage, self.class_weights = teacher, stage, class_weights

    def losses(self, images: Tensor, labels: Targets, stored: TeacherOutput | None = None) -> tuple[Losses, Tensor]:
        """`loss`: (1 - labels_weight) times `kl`, `dkd` or `dist`, the comparison with the teacher's logits, plus
        labels_weight times `cross_entropy`, plus blocks_weight times `mse_blocks`, the sum of all blocks' errors.
        """
        stage = self.stage
        logits, blocks = self.student(images)
        targets: tuple[Tensor, ...] = ()
        if stored is None:
            assert self.teacher is not None
            if stage.blocks_weight:
                values, targets = self.teacher.outputs(images)
            else:
                values = self.teacher.logits(images)
            stored = TeacherOutput(values)
        losses: Losses = {stage.loss: self._compare(logits, stored, labels)}
        loss = (1 - stage.labels_weight) * losses[stage.loss]
        if stage.labels_weight:
            class_weights = self.class_weights if self.training else None
            losses["cross_entropy"] = cross_entropy(logits, labels, class_weights=class_weights)
            loss = loss + stage.labels_weight * losses["cross_entropy"]
        if stage.blocks_weight:
            losses["mse_blocks"] = torch.stack(list(map(block_mse, blocks, targets))).sum(dim=0)
            loss = loss + stage.blocks_weight * losses["mse_blocks"]
        return ({"loss": loss, **losses} if len(losses) > 1 else {"loss": loss}), logits

    def _compare(self, logits: Tensor, output: TeacherOutput, labels: Targets) -> Tensor:
        """The loss of the student's logits against the teacher's output, of each sample: [B]."""
        stage = self.stage
        student, teacher = merge_tail(logits, output.classes, stage.temperature), output.values
        if stage.standardise:
            student, teacher = z_scores(student), z_scores(teacher)
        match stage.loss:
            case "kl":
                return kl_divergence(student, teacher, stage.temperature)
            case "dkd":
                assert isinstance(labels, Tensor), "a stage with loss: dkd does not mix"
                return dkd(student, teacher, labels, stage.temperature, stage.target_weight, stage.others_weight)
            case "dist":
                loss = dist_over_classes(student, teacher, stage.temperature)
                # In training alone: no sample has a correlation over the batch by itself, each gets it in full.
                return loss + dist_over_batch(student, teacher, stage.temperature) if self.training else loss


class Blocks(Objective):
    """Imitation of the teacher's block outputs: Zhou et al. 2020 (arXiv 2007.00811), section 3.

    Bottom-up there is a phase for each block, which trains that block (with `prefix: trained`, those below it too) and
    runs neither student nor teacher above it. Jointly, one phase trains all blocks in one pass.

    A block's input is the output of the student's block below it, whose gradient stops there unless the prefix is
    trained; or with `inputs: teacher` the teacher's output, so that no block waits for another. Where the channels
    differ, linear transforms stand between the networks (see `networks.transforms`). Into another's student nothing can
    be merged: its blocks read each other's outputs as always, and transforms, used for the comparison, are thrown away.

    The classifier is the teacher's, unless `classifier: fresh`, so that the student can be evaluated right after.
    """

    def __init__(self, student: Network, teacher: Teacher, stage: BlocksStage) -> None:
        super().__init__(student)
        self.teacher = teacher
        self.teacher_inputs, self.trained_prefix = stage.inputs == "teacher", stage.prefix == "trained"
        self.phases = stage.phases(student.num_blocks)
        self.weights = stage.block_weights or [1.0] * student.num_blocks
        self.num_phases = len(self.phases)
        channels = list(zip(student.block_channels, teacher.block_channels, strict=True))
        self.up = nn.ModuleList(linear_transform(thin, wide) for thin, wide in channels)
        below = [(wide, thin) if student.merges else (thin, thin) for thin, wide in channels[:-1]]
        self.down = nn.ModuleList(linear_transform(*each) for each in below)
        self.to(next(student.parameters()))
        head = teacher.copy_of_head() if stage.classifier == "teacher" else []
        self.layers_before_classifier = nn.ModuleList(head[:-1])
        self.classifier = head[-1] if head else None
        self.begin_phase(0)

    def begin_phase(self, phase: int) -> None:
        self._phase = self.phases[phase]
        self._frozen: Teacher | None = None
        self._trained: list[nn.Module] = []
        for index in self._phase.trains:  # each block with the transforms around it
            down = [self.down[index - 1]] if index else []
            up = [self.up[index]] if self.student.merges or index in self._phase.targets else []
            self._trained += [*down, *self.student.block_modules(index), *up]
        self.requires_grad_(False)
        for module in self._trained:
            module.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode for what this phase trains, eval mode for the rest."""
        super().train(False)
        self.training = mode
        for module in self._trained:
            module.train(mode)
        return self

    def forward(self, images: Tensor, labels: Targets, stored: TeacherOutput | None = None) -> Losses:
        """`mse_block1` and so on from the bottom, of the blocks that this phase compares; `loss`: weighted sum."""
        targets = self.teacher.blocks(images, self._phase.targets.stop)
        errors = {}
        x, runs = images, self._phase.runs
        in_half = torch.amp.is_autocast_available(device := images.device.type) and torch.is_autocast_enabled(device)
        if in_half and self._phase.has_frozen_prefix and self.student.merges:
            x, runs = self._frozen_prefix(images), self._phase.trains
        for index in runs:
            if self.teacher_inputs and index > 0:
                x = targets[index - 1]
            with torch.set_grad_enabled(index in self._phase.trains):
                x, compared = self._block(index, x if self.trained_prefix else x.detach())
            if index in self._phase.targets:
                errors[f"mse_block{index + 1}"] = block_mse(compared, targets[index])
        return _means(self._with_sum(errors, self._phase.targets))

    def losses(self, images: Tensor, labels: Targets, stored: TeacherOutput | None = None) -> tuple[Losses, Tensor]:
        """The error of every block when the student runs on its own, and `loss`, their weighted sum."""
        errors = {}
        x = images
        for index, target in enumerate(self.teacher.blocks(images, self.student.num_blocks)):
            last = self.student.block(index, x if index == 0 else self.down[index - 1](x))
            compared = self.up[index](last)
            x = compared if self.student.merges else last
            errors[f"mse_block{index + 1}"] = block_mse(compared, target)
        head = self._head()
        logits = self.student.head(last) if head is None else self.student.head(x, head)
        return self._with_sum(errors, range(self.student.num_blocks)), logits

    def finished(self) -> Network:
        """The plain student, its transforms and the teacher's head merged into it."""
        if not self.student.merges:
            return self.student
        return merged(self.student, list(self.up), list(self.down), self._head())

    def _head(self) -> list[nn.Module] | None:
        """The teacher's layers behind its blocks, unless the student keeps its own."""
        return None if self.classifier is None else [*self.layers_before_classifier, self.classifier]

    def _frozen_prefix(self, images: Tensor) -> Tensor:
        """Output of the blocks below those that train, in the teacher's channels.

        They stand still for a whole phase, so they are held in autocast's precision instead of cast in every step.
        """
        first = self._phase.trains.start
        if self._frozen is None:  # not earlier: only when a phase begins has every process rank 0's statistics
            network, dtype = self.finished(), torch.get_autocast_dtype(images.device.type)
            self._frozen = Teacher(network, compiled=self.student.is_compiled, dtype=dtype)
        return cast(Tensor, self.up[first - 1](self._frozen.blocks(images, first)[-1]))

    def _with_sum(self, errors: Losses, blocks: range) -> Losses:
        weighted = [self.weights[index] * error for index, error in zip(blocks, errors.values(), strict=True)]
        return {"loss": torch.stack(weighted).sum(dim=0), **errors}

    def _block(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What student block `index` passes on, and what is compared: both are its output in the teacher's channels,
        as the input is. A student into which nothing can be merged passes on its output as it is.
        """
        x = self.student.block(index, x if index == 0 else self.down[index - 1](x))
        compared = self.up[index](x)
        return (compared if self.student.merges else x), compared


def as_trained(network: Network, stage: Stage, side: int) -> Network:
    """The network as a stage trains it: with rounded weights and activations, if that is `quantised`.

    side: px, of all images. Raises RecipeError if it cannot be quantised.
    """
    if not (isinstance(stage, LogitsStage) and stage.quantised):
        return network
    return Quantised(network, side, symmetric=stage.quantised == "symmetric")


def build_objective(
    stage: LabelsStage | BlocksStage | KlStage, student: Network, teacher: Teacher | None,
    class_weights: Tensor | None = None,
) -> Objective:  # fmt: skip
    """The objective that a stage of a recipe describes, over `student`. Without a teacher, its logits are stored."""
    match stage:
        case LabelsStage():
            return Labels(student, stage.label_smoothing, class_weights)
        case KlStage():
            return Kl(student, teacher, stage, class_weights)
        case BlocksStage():
            assert teacher is not None
            return Blocks(student, teacher, stage)


def _means(losses: Losses) -> Losses:
    return {name: values.mean() for name, values in losses.items()}
