"""Teaching in this process: the teacher, imitation and distillation, each beside its plain way."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from gowide_dist.stages import BlocksStage
from gowide_dist.train.costs import network_cost
from tests.bench import plain as plain_way
from tests.bench.pairs import Figure, in_turns, milliseconds, seconds_of, spread
from tests.bench.subject import Subject, TrainingStep, endless_batches

_NUM_STUDENTS = 3

Step = Callable[[Tensor, Tensor], None]


def teacher(subject: Subject) -> Figure:
    """The teacher's forward pass as PyTorch has it (eager, NCHW), against ours as the recipe has it.

    Beside it the compiled one, whatever the recipe says, and how long compiling took.
    """
    instance = subject.instance("kl", "blocks")
    plain = subject.plain_network(subject.teacher_of(instance)).eval()
    folded, compiled = (subject.teacher(instance, compiled=compiled) for compiled in (False, True))
    images = subject.inputs[0][0]
    nchw = images.contiguous()
    with subject.autocast(), torch.no_grad():
        compile_s = seconds_of(lambda: compiled.logits(images))
        seconds = in_turns(
            "teacher",
            {
                "plain": lambda: plain(nchw),
                "folded": lambda: folded.logits(images),
                "compiled": lambda: compiled.logits(images),
            },
            subject.effort,
        )
    return Figure.of(
        "the teacher's forward pass, eager NCHW over folded channels_last" + ", compiled" * subject.recipe.compile,
        "none",
        seconds["plain"],
        seconds["compiled" if subject.recipe.compile else "folded"],
        not_compiled=spread(seconds["plain"], seconds["folded"]),
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
    wide = subject.teacher(instance)

    def steps(order: str, inputs: str) -> list[TrainingStep]:
        """A step for each phase, which trains a student of its own."""
        options = {"order": order, "inputs": inputs, "prefix": "frozen"}
        stage = BlocksStage.model_validate({**instance.stage.model_dump(), **options})
        num_phases = len(stage.phases(instance.architecture.num_blocks))
        return [subject.step(instance, wide, stage, phase) for phase in range(num_phases)]

    plain = plain_way.imitation_steps(subject, instance)
    with closing(endless_batches(subject.data, subject.recipe.seed)) as batches:
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


def distill_stored(subject: Subject) -> Figure:
    """A distillation step the plain way, against one that reads the teacher's logits from their file.

    Plain: the teacher runs on every batch. Beside it our own live teacher over the stored logits, and the plain way
    with its images in memory.
    """
    instance = subject.instance("kl")
    wide = subject.teacher(instance)
    plain = plain_way.distillation_step(subject, instance)
    with closing(endless_batches(subject.data, subject.recipe.seed)) as batches:
        seconds = in_turns(
            "distill_stored",
            {
                "plain": _each_on_the_next([plain], plain_way.batches(subject)),
                "plain_in_memory": _each_on_the_next([plain], plain_way.batches_in_memory(subject)),
                "live": _each_on_the_next([subject.step(instance, wide)], batches),
                "stored": _each_on_the_next([subject.stored_step(instance, wide)], batches),
            },
            subject.effort,
        )
    student, teacher = instance.architecture, subject.teacher_of(instance)
    shape = subject.data.num_classes, subject.recipe.data.resolution
    return Figure.of(
        "a distillation step the plain way, with an eager teacher, over one with stored logits",
        "at least 3, for a student of at most 1/8 of the teacher's FLOPs",
        seconds["plain"],
        seconds["stored"],
        plain_in_memory=spread(seconds["plain_in_memory"], seconds["stored"]),
        our_live_over_stored=spread(seconds["live"], seconds["stored"]),
        teacher_flops_over_students=round(network_cost(teacher, *shape).macs / network_cost(student, *shape).macs, 1),
        **{f"{name}_step_ms": milliseconds(taken) for name, taken in seconds.items()},
    )


def students_together(subject: Subject) -> Figure:
    """Three students of one teacher, distilled in a stage each, against all in one pass.

    In turn, each reads its images and runs the teacher; together, they share both.
    """
    instance = subject.instance("kl")
    wide = subject.teacher(instance)
    steps = [subject.step(instance, wide) for _ in range(_NUM_STUDENTS)]
    with closing(endless_batches(subject.data, subject.recipe.seed)) as batches:

        def together() -> None:
            batch = next(batches)
            with wide.cached():
                for step in steps:
                    step(*batch)

        sides = {"sequential": _each_on_the_next(steps, batches), "together": together}
        seconds = in_turns("students_together", sides, subject.effort)
    return Figure.of(
        f"distilling {_NUM_STUDENTS} students one after the other over all in one pass, live teacher",
        "at least 1.6",
        seconds["sequential"],
        seconds["together"],
    )


def _each_on_the_next(steps: Sequence[Step], batches: Iterator[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """A turn: every step takes the next batch."""

    def turn() -> None:
        for step in steps:
            step(*next(batches))

    return turn
