"""Losses and accuracies of each sample, as pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MixedLabels(NamedTuple):
    """Labels of mixed images: `own` and those of their `partners`, [B] each, and `lam` [B], the weight of the own."""

    own: Tensor
    partners: Tensor
    lam: Tensor

    def chunk(self, num_chunks: int) -> list[MixedLabels]:
        return [MixedLabels(*part) for part in zip(*(values.chunk(num_chunks) for values in self), strict=True)]


Targets = Tensor | MixedLabels  # labels [B], in training also those of mixed images


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each sample: logits [B, K] twice -> [B].

    Hinton et al. 2015 (arXiv 1503.02531): T^2 keeps the gradient's size whatever the temperature.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, target_weight: float, others_weight: float
) -> Tensor:
    """Decoupled distillation of each sample: logits [B, K] twice, labels [B] -> [B].

    Zhao et al. 2022 (arXiv 2203.08679): alpha TCKD + beta NCKD, here `target_weight` and `others_weight`. TCKD
    is the divergence between label and not label, NCKD that among the other classes; both times T^2 as in the authors'
    code. KL is TCKD + (1 - p) NCKD, with the teacher's probability p of the label.
    """
    label = labels[:, None]
    other = torch.arange(student.shape[1] - 1, device=labels.device)
    other = other + (other >= label)  # [B, K - 1]

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 2], the label and all others merged into one, and [B, K - 1], the others."""
        others = logits.float().gather(1, other)
        merged = temperature * torch.logsumexp(others / temperature, dim=1, keepdim=True)
        return torch.cat([logits.float().gather(1, label), merged], dim=1), others

    (own, own_others), (target, target_others) = split(student), split(teacher)
    tckd = kl_divergence(own, target, temperature)
    return target_weight * tckd + others_weight * kl_divergence(own_others, target_others, temperature)


def dist_over_classes(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """DIST's inter-class term: T^2 (1 - Pearson correlation of the probabilities) of each sample: [B, K] twice -> [B].

    Huang et al. 2022 (arXiv 2205.10536); T^2 as in the authors' code.
    """
    return temperature**2 * (1 - _pearson(*_probabilities(student, teacher, temperature)))


def dist_over_batch(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """DIST's intra-class term: as `dist_over_classes`, of each class over the batch, averaged: a scalar."""
    own, target = _probabilities(student, teacher, temperature)
    return temperature**2 * (1 - _pearson(own.T, target.T)).mean()


def _probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return F.softmax(student.float() / temperature, dim=1), F.softmax(teacher.float() / temperature, dim=1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of each row: [N, M] twice -> [N]. 1e-8, the authors', makes a constant row 0."""
    a, b = (rows - rows.mean(dim=1, keepdim=True) for rows in (a, b))
    norms: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(dim=1) / (norms + 1e-8)


def z_scores(logits: Tensor) -> Tensor:
    """Logits [B, K] less their mean, over their standard deviation (divisor K - 1), of each sample: [B, K].

    Sun et al. 2024 (arXiv 2403.01427); divisor and 1e-7 are those of the authors' code.
    """
    logits = logits.float()
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)


def block_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all entries of a block's output, for each sample: [B, C, H, H] twice -> [B].

    Zhou et al. 2020 (arXiv 2007.00811), section 3: the thin block's output against the wide one's.
    """
    return (student.float() - teacher.float()).square().flatten(1).mean(dim=1)


def cross_entropy(
    logits: Tensor, labels: Targets, smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each sample: logits [B, K], labels [B] -> [B]; of mixed images, that on both labels weighted.

    `smoothing` is the part of the target that is shared equally by all classes (Szegedy et al. 2016, arXiv 1512.00567).
    `class_weights` [K] multiply a sample's by its label's, and no mean divides by them: gradients of processes and of
    micro-batches add up to that of the whole batch.
    """
    if isinstance(labels, MixedLabels):
        own, partners = (cross_entropy(logits, of, smoothing, class_weights) for of in (labels.own, labels.partners))
        return labels.lam * own + (1 - labels.lam) * partners
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return losses if class_weights is None else class_weights[labels] * losses


def balanced_weights(counts: Tensor) -> Tensor:
    """Weights with which every class counts alike: N / (K N_k) for N_k of N images, K classes: [K] float32.

    Their mean over the images is 1. A class without images has 0, and is not among the K.
    """
    weights = counts.sum() / ((counts > 0).sum() * counts.double())
    return weights.where(counts > 0, 0).float()


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Whether the label is the best (`top1`) or among the five best (`top5`) of each sample: 0 or 1, [B] each."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels[:, None]).float()
    return {"top1": hits[:, 0], "top5": hits.sum(dim=1)}
