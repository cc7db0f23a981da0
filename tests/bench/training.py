"""The training loop in this process: what it costs beside the bare step, and what saving costs it."""

import itertools
import statistics
from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gowide_dist.data.loader import Batch
from gowide_dist.progress import Track
from gowide_dist.recipe import Checkpoints
from gowide_dist.train.costs import network_cost
from tests.bench.pairs import Figure, clock, milliseconds, seconds_of
from tests.bench.subject import OPTIM, Enough, Subject

_WARM_UP_STEPS = 5
_STEPS_AROUND_SAVE = 6


def loop(subject: Subject) -> Figure:
    """The training loop as it is, against forward, backward and optimizer step alone, on the same tensors.

    The loop turns pixels into input, logs as often as the recipe says, shows progress and looks whether a checkpoint
    is due; what a checkpoint costs is measured by itself. Neither side waits for data, which is in memory.
    """
    steps = subject.recipe.log_every_steps  # in a pair, so that every pair has a line in the log
    bare = _bare_step(subject)
    stream = _Stream("loop", subject, _WARM_UP_STEPS + subject.effort.pairs * steps, bare)
    subject.run_loop(subject.student, stream)
    loops, bares = (_sums(seconds[_WARM_UP_STEPS:], steps) for seconds in (stream.seconds, stream.seconds_before))
    return Figure.of(
        "a step of the training loop over a bare forward, backward, step on the same tensors, data in memory",
        "at most 1.03",
        loops,
        bares,
        steps_per_pair=steps,
        bare_step_ms=milliseconds([seconds / steps for seconds in bares]),
    )


def checkpoint(subject: Subject) -> Figure:
    """What saving costs the training loop: its seconds around a save, less as many steps without one.

    The ratio is that over the interval between two checkpoints. Of the network with the most parameters.
    """
    num_classes, side = subject.data.num_classes, subject.recipe.data.resolution
    widest = max(
        subject.recipe.architectures.values(), key=lambda network: network_cost(network, num_classes, side).parameters
    )
    every = 2 * _STEPS_AROUND_SAVE
    stream = _Stream("checkpoint", subject, (subject.effort.pairs + 1) * every)
    subject.run_loop(widest, stream, checkpoints={"every_steps": every})
    sums = _sums(stream.seconds[_STEPS_AROUND_SAVE // 2 :], _STEPS_AROUND_SAVE)  # without, with, without, ...
    without, around = sums[0::2], sums[1::2]
    usual = statistics.median(stream.seconds)
    stalls = [seconds - usual for seconds in stream.seconds[every - 1 :: every]]
    minutes = subject.recipe.checkpoints.every_minutes or Checkpoints().every_minutes
    assert minutes is not None
    costs = [more - less for more, less in zip(around, without, strict=False)]
    network = subject.plain_network(widest)
    saves = [seconds_of(partial(subject.save, network, step)) for step in range(subject.effort.pairs)]
    return Figure.around(
        f"seconds that a save costs training over the {minutes:g} minutes between saves",
        "at most 0.01",
        [cost / (60 * minutes) for cost in costs],
        cost_of_a_save_ms=milliseconds(costs),
        standstill_of_a_save_ms=milliseconds(stalls),
        save_in_the_foreground_ms=milliseconds(saves),
        step_ms=milliseconds(stream.seconds),
        parameters=network_cost(widest, num_classes, side).parameters,
    )


def _bare_step(subject: Subject) -> Callable[[Tensor, Tensor], None]:
    network = subject.network(subject.student).train()
    optimizer = torch.optim.SGD(
        network.parameters(), OPTIM.lr, OPTIM.momentum, weight_decay=OPTIM.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(subject.world.device.type, enabled=subject.recipe.precision == "fp16")

    def step(images: Tensor, labels: Tensor) -> None:
        with subject.autocast():
            logits, _ = network(images)
            loss = F.cross_entropy(logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


class _Stream:
    """A loader from memory that times every step of the loop (`seconds`), and what is done before it on its tensors."""

    def __init__(
        self, name: str, subject: Subject, num_steps: int, before: Callable[[Tensor, Tensor], None] | None = None
    ) -> None:
        self._name, self._subject, self._num_steps, self._before = name, subject, num_steps, before
        self.steps_per_epoch = num_steps + 1  # the epoch, with which the loop would evaluate, does not end
        self.seconds: list[float] = []
        self.seconds_before: list[float] = []

    def preflight(self, num_classes: int) -> None:
        """The data has been checked."""

    def batches(self, epoch: int, start: int, resolution: int) -> Generator[Batch, None, None]:
        """As a loader's. Raises Enough after the last step."""
        stored = itertools.cycle(zip(self._subject.batches, self._subject.inputs, strict=True))
        with Track(self._name, self._num_steps, "steps", stderr=True) as track:
            for step in range(self._num_steps):
                batch, inputs = next(stored)
                began = clock()
                if self._before:
                    self._before(*inputs)
                between = clock()
                yield batch
                self.seconds.append(clock() - between)
                self.seconds_before.append(between - began)
                track.update(step + 1)
        raise Enough

    def close(self) -> None:
        """Nothing is open."""


def _sums(values: Sequence[float], count: int) -> list[float]:
    """Sums of `count` values each, from the first on; what is left over is left out."""
    return [sum(values[start : start + count]) for start in range(0, len(values) - count + 1, count)]
