"""Stochastic gradient descent, and what changes from step to step, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from gowide_dist.stages import Optim, Stage
from gowide_dist.timeline import Timeline


def learning_rate(step: int, timeline: Timeline, stage: Stage) -> float:
    """Learning rate of `step`. The schedule starts anew with every phase, and spans it.

    Linear warm-up from 0, then `lr` throughout; or `lr * factor^(milestones passed)`, counted from the start; or over
    what the warm-up leaves, a line or half a cosine from `lr` to 0 (Loshchilov & Hutter 2017, without restarts).
    """
    optim, schedule = stage.optim, stage.schedule
    assert optim is not None, "a stage that trains has an optim"
    steps = timeline.phase(timeline.phase_of(step))
    done = step - steps.start
    warmup = schedule.warmup_epochs * timeline.steps_per_epoch
    if done < warmup:
        return optim.lr * done / warmup
    if schedule.decay == "step":
        passed = sum(done >= milestone * timeline.steps_per_epoch for milestone in schedule.milestones)
        return optim.lr * schedule.factor**passed
    part = (done - warmup) / (len(steps) - warmup)
    if schedule.decay == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * part))
    if schedule.decay == "linear":
        return optim.lr * (1 - part)
    return optim.lr


def average_decay(step: int, timeline: Timeline, ema: float) -> float:
    """Decay of the moving average at `step`: the recipe's, once a phase is long enough to have forgotten its start.

    It warms up as in timm's ModelEmaV3, with the power that is recommended there for less than a million steps: the
    first step of a phase replaces the average by the weights, 0.99 is reached after 464 steps, 0.999 after 10,000.
    """
    done = step - timeline.phase(timeline.phase_of(step)).start
    return min(ema, 1 - math.pow(1 + done, -3 / 4))


class Optimizer:
    """Stochastic gradient descent on the trainable parameters of a module, as a recipe describes it."""

    def __init__(self, module: nn.Module, optim: Optim, scaled: bool) -> None:
        """scaled: scale the loss so that gradients fit into fp16, and skip steps in which they overflow."""
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        vectors = [parameter for parameter in self._parameters if parameter.ndim < 2]  # of norms, and biases
        matrices = [parameter for parameter in self._parameters if parameter.ndim >= 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": vectors, "weight_decay": optim.weight_decay if optim.decay_norms else 0.0},
        ]
        self._optimizer = SGD(
            [group for group in groups if group["params"]],
            lr=optim.lr,
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        if scaled and optim.momentum:  # a fused first step that overflows would leave its momentum uninitialised
            for parameter in self._parameters:
                self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._clip_norm = optim.clip_norm
        self._scaler = torch.amp.GradScaler(self._parameters[0].device.type, enabled=scaled)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> None:
        """Step with learning rate `lr`, then clear the gradient."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])


class MovingAverage:
    """Exponential moving average of a module's parameters and statistics, updated after every step."""

    def __init__(self, module: nn.Module) -> None:
        tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}  # shared ones once
        self._live = [tensor.detach() for tensor in tensors.values() if tensor.is_floating_point()]
        self._average = [tensor.clone() for tensor in self._live]

    def update(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weights."""
        torch._foreach_lerp_(self._average, self._live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the average as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for live, average in zip(self._live, self._average, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> list[Tensor]:
        return self._average

    def load_state_dict(self, state: list[Tensor]) -> None:
        for average, stored in zip(self._average, state, strict=True):
            average.copy_(stored)
