"""Teaching in this process: the teacher, imitation and distillation, each beside its plain way."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gowide_dist.insight.bench.pairs import Figure, in_turns, milliseconds, seconds_of, spread
from gowide_dist.insight.bench.subject import OPTIM, Subject, TrainingStep
from gowide_dist.networks import Teacher
from gowide_dist.objectives import build_objective
from gowide_dist.recipe import BlocksStage, Instance, KlStage
from gowide_dist.student import autocast
from gowide_dist.teacher_logits import Layout, Source, TeacherLogits, stored_logits
from gowide_dist.transforms import linear_transform

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
