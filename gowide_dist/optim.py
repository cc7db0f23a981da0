"""Stochastic gradient descent, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD

from gowide_dist.recipe import Optim, Schedule


@dataclass(frozen=True)
class Timeline:
    """The steps of a stage: `total_steps`, cut into `num_phases` phases as equal as whole steps allow."""

    steps_per_epoch: int
    epochs: int
    num_phases: int = 1

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.steps_per_epoch * self.epochs

    def phase(self, index: int) -> range:
        """The steps of phase `index`."""
        total = self.total_steps
        return range(total * index // self.num_phases, total * (index + 1) // self.num_phases)


def learning_rate(step: int, steps: range, steps_per_epoch: int, optim: Optim, schedule: Schedule) -> float:
    """Learning rate of `step`, for a schedule that spans `steps`.

    Linear warm-up from 0, then either `lr` throughout, `lr * factor^(milestones passed)` counted from the start, or
    half a cosine from `lr` to 0 over what the warm-up leaves (Loshchilov & Hutter 2017, without restarts).
    """
    done = step - steps.start
    warmup = schedule.warmup_epochs * steps_per_epoch
    if done < warmup:
        return optim.lr * done / warmup
    if schedule.decay == "step":
        passed = sum(done >= milestone * steps_per_epoch for milestone in schedule.milestones)
        return optim.lr * schedule.factor**passed
    if schedule.decay == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (len(steps) - warmup)))
    return optim.lr


def build_optimizer(module: nn.Module, optim: Optim) -> SGD:
    """SGD over the trainable parameters of `module`."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return SGD(trainable, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)
