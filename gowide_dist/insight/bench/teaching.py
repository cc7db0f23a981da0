"""Teaching in this process: the teacher, imitation and distillation, each beside its plain way."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from gowide_dist.insight.bench import plain as plain_way
from gowide_dist.insight.bench.pairs import Figure, in_turns, milliseconds, seconds_of, spread
from gowide_dist.insight.bench.subject import Subject, TrainingStep, endless_batches
from gowide_dist.networks.teacher import Teacher
from gowide_dist.recipe import BlocksStage
from gowide_dist.train.objectives import build_objective
from gowide_dist.train.student import autocast
from gowide_dist.train.teacher_logits import Layout, TeacherLogits, stored_logits

_NUM_STUDENTS = 3


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

    Plain: block by block, bottom to top, the whole teacher and the student's own blocks up to that one run, and the
    error goes back through all of them. Ours: `order: joint, inputs: teacher`, one pass for all blocks. Beside it
    `order: bottom-up`, and the plain way with its images in memory.
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

    plain = plain_way.imitation_steps(subject, instance)
    with closing(endless_batches(subject.images, subject.recipe.seed)) as batches:
        seconds = in_turns(
            "imitate",
            {
                "plain": _each_on_the_next(plain, plain_way.batches(subject)),
                "plain_in_memory": _each_on_the_next(plain, plain_way.batches_in_memory(subject)),
                "joint": _each_on_the_next(steps("joint", "teacher"), batches),
                "bottom_up": _each_on_the_next(steps("bottom-up", "student"), batches),
            },
            subject.effort,
        )
    return Figure.of(
        "imitation of all blocks, the plain way over one pass for all (order: joint, inputs: teacher)",
        "at least 3",
        seconds["plain"],
        seconds["joint"],
        plain_in_memory=spread(seconds["plain_in_memory"], seconds["joint"]),
        bottom_up=spread(seconds["plain"], seconds["bottom_up"]),
        images_and_epochs_per_block="the same",
    )


def _each_on_the_next(
    steps: Sequence[Callable[[Tensor, Tensor], None]], batches: Iterator[tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    """A turn: every step takes the batch that comes next."""

    def turn() -> None:
        for step in steps:
            step(*next(batches))

    return turn


def distill_stored(subject: Subject) -> Figure:
    """A distillation step the plain way, against one that reads the teacher's logits from their file.

    Plain: the teacher runs on every batch. Beside it our own live teacher over the stored logits, and the plain way
    with its images in memory.
    """
    instance = subject.instance("kl")
    taught = subject.teacher(instance)
    logits = _store(subject, taught)
    live, stored = (
        subject.step(build_objective(instance.stage, subject.network(instance.architecture), teacher, seed=0))
        for teacher in (taught, None)
    )
    rows = itertools.cycle(range(0, len(subject.inputs) * subject.recipe.batch_size, subject.recipe.batch_size))

    def stored_step(images: Tensor, labels: Tensor) -> None:
        stored(images, labels, 0, logits.train(next(rows), len(labels)).to(subject.world.device))

    plain = plain_way.distillation_step(subject, instance)
    with closing(endless_batches(subject.images, subject.recipe.seed)) as batches:
        seconds = in_turns(
            "distill_stored",
            {
                "plain": _each_on_the_next([plain], plain_way.batches(subject)),
                "plain_in_memory": _each_on_the_next([plain], plain_way.batches_in_memory(subject)),
                "live": _each_on_the_next([live], batches),
                "stored": _each_on_the_next([stored_step], batches),
            },
            subject.effort,
        )
    thin, wide = instance.architecture, subject.teacher_of(instance)
    shape = subject.images.num_classes, subject.recipe.data.resolution
    return Figure.of(
        "a distillation step the plain way, with an eager teacher, over one with stored logits",
        "at least 3, for a student of at most 1/8 of the teacher's FLOPs",
        seconds["plain"],
        seconds["stored"],
        plain_in_memory=spread(seconds["plain_in_memory"], seconds["stored"]),
        our_live_over_stored=spread(seconds["live"], seconds["stored"]),
        teacher_flops_over_students=round(wide.macs(*shape) / thin.macs(*shape), 1),
        **{f"{name}_step_ms": milliseconds(taken) for name, taken in seconds.items()},
    )


def _store(subject: Subject, taught: Teacher) -> TeacherLogits:
    """The teacher's logits for the batches in memory, in a file as a stage's."""
    rows = sum(len(labels) for _, labels in subject.inputs)
    layout = Layout(1, rows, 1, subject.images.num_classes, None, 1.0)

    def ask(inputs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        with autocast(subject.recipe, subject.world):
            yield from (taught.logits(images) for images, _ in inputs)

    first = subject.inputs[0]

    def source(epoch: int | None) -> Iterator[Tensor]:
        return ask([(first[0][:1], first[1][:1])] if epoch is None else subject.inputs)

    with contextlib.redirect_stdout(io.StringIO()):
        return stored_logits(subject.folder, {"for": "bench"}, layout, source, subject.world, "bench")


def students_together(subject: Subject) -> Figure:
    """Three students of one teacher, distilled in a stage each, against all in one pass.

    Apart, each reads its images and asks the teacher; together, they share both.
    """
    instance = subject.instance("kl")
    taught = subject.teacher(instance)
    steps = [
        subject.step(build_objective(instance.stage, subject.network(instance.architecture), taught, seed=0))
        for _ in range(_NUM_STUDENTS)
    ]
    with closing(endless_batches(subject.images, subject.recipe.seed)) as batches:

        def together() -> None:
            batch = next(batches)
            with taught.cached():
                for step in steps:
                    step(*batch)

        sides = {"apart": _each_on_the_next(steps, batches), "together": together}
        seconds = in_turns("students_together", sides, subject.effort)
    return Figure.of(
        f"distilling {_NUM_STUDENTS} students one after the other over all in one pass, live teacher",
        "at least 1.6",
        seconds["apart"],
        seconds["together"],
    )
