"""Training in this process: the loop, the teacher, imitation and distillation, each beside its plain way."""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gowide_dist.architecture import Architecture
from gowide_dist.checkpoint import save_checkpoint
from gowide_dist.data.loader import Batch, Loader
from gowide_dist.insight.bench.pairs import Figure, clock, in_turns, milliseconds, seconds_of, spread
from gowide_dist.insight.bench.subject import OPTIM, Subject, TrainingStep
from gowide_dist.networks import Teacher
from gowide_dist.objectives import build_objective
from gowide_dist.progress import Track
from gowide_dist.recipe import BlocksStage, Checkpoints, Instance, KlStage, LabelsStage, Recipe
from gowide_dist.run import Run, identities
from gowide_dist.stage import Workshop, train_stage
from gowide_dist.student import autocast
from gowide_dist.teacher_logits import Layout, Source, TeacherLogits, stored_logits
from gowide_dist.transforms import linear_transform

_WARM_UP_STEPS = 5
_STEPS_AROUND_SAVE = 6
_NUM_STUDENTS = 3


def loop(subject: Subject) -> Figure:
    """The training loop as it is, against forward, backward and optimiser step alone, on the same tensors.

    The loop turns pixels into input, logs as often as the recipe says, shows progress and looks whether a checkpoint
    is due; what a checkpoint costs is measured apart. Neither side waits for data, which is in memory.
    """
    steps = subject.recipe.log_every_steps  # in a pair, so that every pair has a line in the log
    bare = _bare_step(subject)
    stream = _Stream("loop", subject, _WARM_UP_STEPS + subject.effort.pairs * steps, bare)
    _run_loop(subject, subject.student, stream)
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
    num_classes = subject.images.num_classes
    widest = max(subject.recipe.architectures.values(), key=lambda network: network.num_parameters(num_classes))
    every = 2 * _STEPS_AROUND_SAVE
    stream = _Stream("checkpoint", subject, (subject.effort.pairs + 1) * every)
    _run_loop(subject, widest, stream, checkpoints={"every_steps": every})
    sums = _sums(stream.seconds[_STEPS_AROUND_SAVE // 2 :], _STEPS_AROUND_SAVE)  # without, with, without, ...
    without, around = sums[0::2], sums[1::2]
    usual = statistics.median(stream.seconds)
    stalls = [seconds - usual for seconds in stream.seconds[every - 1 :: every]]
    minutes = subject.recipe.checkpoints.every_minutes or Checkpoints().every_minutes
    assert minutes is not None
    costs = [more - less for more, less in zip(around, without, strict=False)]
    return Figure.around(
        f"seconds that a save costs training over the {minutes:g} minutes between saves",
        "at most 0.01",
        [cost / (60 * minutes) for cost in costs],
        cost_of_a_save_ms=milliseconds(costs),
        standstill_of_a_save_ms=milliseconds(stalls),
        save_in_the_foreground_ms=milliseconds(_foreground_saves(subject, widest)),
        step_ms=milliseconds(stream.seconds),
        parameters=widest.num_parameters(num_classes),
    )


def _foreground_saves(subject: Subject, architecture: Architecture) -> list[float]:
    """Seconds of writing a training state (weights, statistics, momentum) while nothing else is done."""
    network = subject.plain_network(architecture)
    state = {"objective": network.state_dict(), "momentum": list(network.parameters())}
    folder = subject.folder / "checkpoints"
    folder.mkdir()
    return [
        seconds_of(partial(save_checkpoint, folder, state, step=step, about={}, keep=1))
        for step in range(subject.effort.pairs)
    ]


def _run_loop(subject: Subject, architecture: Architecture, stream: _Stream, **changes: Any) -> None:
    """Train a network on labels in the real loop until the stream ends."""
    stage = LabelsStage(train=("network",), objective="labels", epochs=1, optim=OPTIM)
    recipe = Recipe.model_validate(
        {
            **subject.recipe.model_dump(),
            "networks": {"network": architecture.model_dump()},
            "stages": {"stage": stage.model_dump()},
            **changes,
        }
    )
    images = replace(subject.images, train=lambda seed: cast(Loader, stream))
    with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
        shop = Workshop(recipe, Run(Path(folder)), subject.world, images, identities(recipe, subject.checksums))
        with contextlib.suppress(_Enough), contextlib.redirect_stdout(io.StringIO()):
            train_stage(recipe.instances["stage/network"], shop)


def _bare_step(subject: Subject) -> Callable[[Tensor, Tensor], None]:
    network = subject.network(subject.student).train()
    optimizer = torch.optim.SGD(
        network.parameters(), OPTIM.lr, OPTIM.momentum, weight_decay=OPTIM.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(subject.world.device.type, enabled=subject.recipe.precision == "fp16")

    def step(images: Tensor, labels: Tensor) -> None:
        with autocast(subject.recipe, subject.world):
            logits, _ = network(images)
            loss = F.cross_entropy(logits, labels)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


class _Enough(Exception):  # noqa: N818 -- no error
    """All pairs are measured."""


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
        """As a loader's. Raises _Enough after the last step."""
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
        raise _Enough

    def close(self) -> None:
        """Nothing is open."""


def _sums(values: Sequence[float], count: int) -> list[float]:
    """Sums of so many values each, from the first on; what is left over is left out."""
    return [sum(values[start : start + count]) for start in range(0, len(values) - count + 1, count)]


def teacher(subject: Subject) -> Figure:
    """The teacher's forward pass as PyTorch has it (eager, NCHW), against ours as the recipe has it.

    Beside it the compiled one, whatever the recipe says, and how long compiling took.
    """
    instance = subject.instance("kl", "blocks")
    plain = subject.plain_network(subject.teacher_of(instance)).eval()
    ours, compiled = (subject.teacher(instance, compiled=compiled) for compiled in (False, True))
    images = subject.inputs[0][0]
    nchw = images.contiguous()
    with autocast(subject.recipe, subject.world), torch.no_grad():
        compile_s = seconds_of(lambda: compiled.logits(images))
        seconds = in_turns(
            "teacher",
            {
                "plain": lambda: plain(nchw),
                "ours": lambda: ours.logits(images),
                "compiled": lambda: compiled.logits(images),
            },
            subject.effort,
        )
    chosen = "compiled" if subject.recipe.compile else "ours"
    return Figure.of(
        "the teacher's forward pass, eager NCHW over folded channels_last" + ", compiled" * subject.recipe.compile,
        "none",
        seconds["plain"],
        seconds[chosen],
        not_compiled=spread(seconds["plain"], seconds["ours"]),
        compiled=spread(seconds["plain"], seconds["compiled"]),
        compile_seconds=round(compile_s, 1),
    )


def imitate(subject: Subject) -> Figure:
    """Imitation of all blocks, each for the same images: the plain way against all blocks in one pass.

    Plain: eager networks with hooks, bottom to top; for every block the whole teacher and the student's own blocks up
    to it run, and the error goes back through all of them. Ours: `order: joint, inputs: teacher`, one pass for all
    blocks. Beside it `order: bottom-up`.
    """
    instance = subject.instance("blocks")
    taught = subject.teacher(instance)

    def steps(order: str, inputs: str) -> list[TrainingStep]:
        """A step for each phase, which trains a student of its own."""
        options = {"order": order, "inputs": inputs, "prefix": "frozen"}
        stage = BlocksStage.model_validate({**instance.stage.model_dump(), **options})
        found = []
        for phase in range(instance.architecture.num_blocks if order == "bottom-up" else 1):
            objective = build_objective(stage, subject.network(instance.architecture), taught, seed=0)
            objective.begin_phase(phase)
            found.append(subject.step(objective))
        return found

    def all_blocks(steps: Sequence[Callable[[Tensor, Tensor], None]]) -> Callable[[], None]:
        """Take one batch through every block."""
        batches = itertools.cycle(subject.inputs)

        def turn() -> None:
            batch = next(batches)
            for step in steps:
                step(*batch)

        return turn

    seconds = in_turns(
        "imitate",
        {
            "plain": all_blocks(_plain_imitation(subject, instance)),
            "joint": all_blocks(steps("joint", "teacher")),
            "bottom_up": all_blocks(steps("bottom-up", "student")),
        },
        subject.effort,
    )
    return Figure.of(
        "imitation of all blocks, the plain way over one pass for all (order: joint, inputs: teacher)",
        "at least 3",
        seconds["plain"],
        seconds["joint"],
        bottom_up=spread(seconds["plain"], seconds["bottom_up"]),
        images_and_epochs_per_block="the same",
    )


def _plain_imitation(subject: Subject, instance: Instance) -> list[Callable[[Tensor, Tensor], None]]:
    """For each block a step of the plain way, as a script with hooks does it."""
    wide = subject.plain_network(subject.teacher_of(instance)).eval()
    thin = subject.plain_network(instance.architecture).train()
    seen: dict[str, Tensor] = {}
    for index in range(wide.num_blocks):
        wide.layer(index).register_forward_hook(lambda *call, name=f"wide{index}": seen.update({name: call[2]}))
    channels = zip(thin.architecture.block_channels, wide.architecture.block_channels, strict=True)
    ups = [linear_transform(*pair).to(subject.world.device) for pair in channels]

    def step_of(index: int) -> Callable[[Tensor, Tensor], None]:
        parts = [*thin.block_modules(index), ups[index]]
        parameters = [parameter for part in parts for parameter in part.parameters()]
        optimizer = torch.optim.SGD(parameters, OPTIM.lr, OPTIM.momentum)

        def step(images: Tensor, labels: Tensor) -> None:
            images = images.contiguous()  # NCHW
            with autocast(subject.recipe, subject.world):
                with torch.no_grad():
                    wide(images)
                mine = ups[index](thin.blocks(images, index + 1)[-1])
                loss = F.mse_loss(mine, seen[f"wide{index}"])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            thin.zero_grad()

        return step

    return [step_of(index) for index in range(thin.num_blocks)]


def distill_stored(subject: Subject) -> Figure:
    """A distillation step the plain way, against one that reads the teacher's logits from their file.

    Plain: eager networks, the teacher run on every batch. Beside it our own live teacher over the stored logits.
    """
    instance = subject.instance("kl")
    taught = subject.teacher(instance)
    logits = _store(subject, taught)
    live, stored = (
        subject.step(build_objective(instance.stage, subject.network(instance.architecture), teacher, seed=0))
        for teacher in (taught, None)
    )

    def stored_step(index: int) -> None:
        images, labels = subject.inputs[index]
        stored(images, labels, 0, logits.train(index * len(labels), len(labels)).to(subject.world.device))

    def in_memory(step: Callable[[Tensor, Tensor], None]) -> Callable[[int], None]:
        return lambda index: step(*subject.inputs[index])

    def over_batches(step: Callable[[int], None]) -> Callable[[], None]:
        indices = itertools.cycle(range(len(subject.inputs)))
        return lambda: step(next(indices))

    sides = {"plain": in_memory(_plain_distillation(subject, instance)), "live": in_memory(live), "stored": stored_step}
    seconds = in_turns("distill_stored", {name: over_batches(step) for name, step in sides.items()}, subject.effort)
    thin, wide = instance.architecture, subject.teacher_of(instance)
    shape = subject.images.num_classes, subject.recipe.data.resolution
    return Figure.of(
        "a distillation step the plain way, with an eager teacher, over one with stored logits",
        "at least 3, for a student of at most 1/8 of the teacher's FLOPs",
        seconds["plain"],
        seconds["stored"],
        our_live_over_stored=spread(seconds["live"], seconds["stored"]),
        teacher_flops_over_students=round(wide.macs(*shape) / thin.macs(*shape), 1),
        **{f"{name}_step_ms": milliseconds(taken) for name, taken in seconds.items()},
    )


def _plain_distillation(subject: Subject, instance: Instance) -> Callable[[Tensor, Tensor], None]:
    """A distillation step as a script does it."""
    stage = instance.stage
    assert isinstance(stage, KlStage)
    temperature, labels_weight = stage.temperature, stage.labels_weight
    wide = subject.plain_network(subject.teacher_of(instance)).eval()
    thin = subject.plain_network(instance.architecture).train()
    optimizer = torch.optim.SGD(thin.parameters(), OPTIM.lr, OPTIM.momentum, weight_decay=OPTIM.weight_decay)

    def step(images: Tensor, labels: Tensor) -> None:
        images = images.contiguous()  # NCHW
        with autocast(subject.recipe, subject.world):
            with torch.no_grad():
                theirs, _ = wide(images)
            mine, _ = thin(images)
            log_mine, log_theirs = (F.log_softmax(logits / temperature, dim=1) for logits in (mine, theirs))
            divergence = F.kl_div(log_mine, log_theirs, reduction="batchmean", log_target=True)
            loss = (1 - labels_weight) * temperature**2 * divergence + labels_weight * F.cross_entropy(mine, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        thin.zero_grad()

    return step


def _store(subject: Subject, taught: Teacher) -> TeacherLogits:
    """The teacher's logits for the batches in memory, in a file as a stage's."""
    rows = sum(len(labels) for _, labels in subject.inputs)
    layout = Layout(1, rows, 1, subject.images.num_classes, None, 1.0)

    def ask(inputs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        with autocast(subject.recipe, subject.world):
            yield from (taught.logits(images) for images, _ in inputs)

    first = subject.inputs[0]
    source = Source(lambda epoch: ask(subject.inputs), lambda: ask([(first[0][:1], first[1][:1])]))
    with contextlib.redirect_stdout(io.StringIO()):
        return stored_logits(subject.folder, {"for": "bench"}, layout, source, subject.world, "bench")


def students_together(subject: Subject) -> Figure:
    """Three students of one teacher, distilled in a stage each, against all in one pass.

    Apart, each prepares its images and asks the teacher; together, they share both. Reading images is left out.
    """
    instance = subject.instance("kl")
    taught = subject.teacher(instance)
    steps = [
        subject.step(build_objective(instance.stage, subject.network(instance.architecture), taught, seed=0))
        for _ in range(_NUM_STUDENTS)
    ]
    batches = itertools.cycle(subject.batches)

    def apart() -> None:
        batch = next(batches)
        for step in steps:
            step(*subject.images.to_device(batch))

    def together() -> None:
        images, labels = subject.images.to_device(next(batches))
        with taught.answering_once():
            for step in steps:
                step(images, labels)

    seconds = in_turns("students_together", {"apart": apart, "together": together}, subject.effort)
    return Figure.of(
        f"distilling {_NUM_STUDENTS} students one after the other over all in one pass, live teacher",
        "at least 1.6",
        seconds["apart"],
        seconds["together"],
    )
