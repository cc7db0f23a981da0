"""Losses and accuracies of each sample, as pure functions."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each sample: logits [B, K] twice -> [B].

    Hinton et al. 2015 (arXiv 1503.02531): T^2 keeps the gradient's size whatever the temperature.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


def block_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all entries of a block's output, for each sample: [B, C, H, H] twice -> [B].

    Zhou et al. 2020 (arXiv 2007.00811), section 3: the thin block's output against the wide one's.
    """
    return (student.float() - teacher.float()).square().flatten(1).mean(dim=1)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample: logits [B, K], labels [B] -> [B].

    `smoothing` is the part of the target that is shared equally by all classes (Szegedy et al. 2016, arXiv 1512.00567).
    """
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)


def mixup_lam(alpha: float, seed: int, step: int) -> float:
    """The first image's part in each pair of a batch: Beta(alpha, alpha) (Zhang et al. 2018, arXiv 1710.09412)."""
    return float(np.random.default_rng((seed, step)).beta(alpha, alpha))


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Whether the label is the best (`top1`) or among the five best (`top5`) of each sample: 0 or 1, [B] each."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels[:, None]).float()
    return {"top1": hits[:, 0], "top5": hits.sum(dim=1)}
