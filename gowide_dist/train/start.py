"""What a stage starts from: the newest common checkpoint, else finished weights, else a fresh network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from gowide_dist.data.preprocessing import read_preprocessing
from gowide_dist.errors import RunError
from gowide_dist.instances import Instance
from gowide_dist.networks.build import build_network, build_unseeded
from gowide_dist.networks.network import Network
from gowide_dist.networks.pruning import take_over, take_over_strongest
from gowide_dist.networks.quantised import Quantised
from gowide_dist.networks.teacher import Teacher
from gowide_dist.networks.weights import load_weights
from gowide_dist.networks.wrapped import synchronised
from gowide_dist.run import Run
from gowide_dist.stages import KlStage, LogitsStage, Stage, TaughtStage
from gowide_dist.timeline import Batching, Timeline
from gowide_dist.train.checkpoint import load_checkpoint, whole_checkpoints
from gowide_dist.train.context import COMPUTE_DTYPES, TrainContext
from gowide_dist.train.metrics import StreamDigest
from gowide_dist.train.objectives import Objective, as_trained, build_objective
from gowide_dist.train.stream import Stream
from gowide_dist.train.student import Student
from gowide_dist.train.teacher_logits import Layout, TeacherLogits, stored_logits
from gowide_dist.train.writing import Writer

TAKE_OVER = {"teacher": take_over, "pruned": take_over_strongest, "fresh": None}  # by `start` of a stage


def start_steps(instances: Sequence[Instance], ctx: TrainContext) -> list[tuple[int, list[str]]]:
    """The steps to start from, each with the keys of the instances that train together from there.

    The newest step that all instances have saved; where there is none, those with the same newest step are a group.
    """
    saved = {
        instance.key: whole_checkpoints(ctx.run.stage(instance.key).checkpoints, ctx.fingerprint(instance.key)) or [0]
        for instance in instances
    }
    if common := set.intersection(*map(set, saved.values())):
        return [(max(common), list(saved))]
    groups = defaultdict(list)
    for key, steps in saved.items():
        groups[max(steps)].append(key)
    return list(groups.items())


def build_students(
    instances: Sequence[Instance], start: int, stream: Stream, writer: Writer, ctx: TrainContext, name: str
) -> tuple[list[Student], Teacher | None]:
    """The students of a stage as they are at step `start`, and the teacher that answers them, if they need it live.

    Every process loads the teacher once, whatever the number of students.
    """
    first, stage = instances[0], instances[0].stage
    if isinstance(stage, KlStage) and stage.has_stored_logits:
        stream.stored = stored_logits_of(first, stream, ctx, name)
    teacher_network = teacher = None
    if first.teacher and (TAKE_OVER[_start(stage)] or not stream.stored):
        teacher_network = _load_teacher(first, ctx)
        teacher = None if stream.stored else _build_teacher(teacher_network, ctx)

    accumulate = stage.optim.accumulate if stage.optim else 1
    batching = Batching(ctx.recipe.batch_size, ctx.world.size, ctx.world.rank, accumulate)
    students = []
    for instance in instances:
        objective = _initial_objective(instance, stream, ctx, teacher_network, teacher)
        timeline = Timeline(batching, stream.steps_per_epoch, stage.epochs, objective.num_phases)
        students.append(Student(instance, objective, ctx, timeline, writer))
    states = [load_checkpoint(student.stage_dir.checkpoints, start) if start else None for student in students]
    seen = {state["stream"] if state else "0" for state in states}
    assert len(seen) == 1, "at one step of one stream all have seen the same samples"
    stream.digest = StreamDigest(seen.pop())
    for student, state in zip(students, states, strict=True):
        student.start(start, state)
    return students, teacher


def _initial_objective(
    instance: Instance, stream: Stream, ctx: TrainContext, teacher_network: Network | None, teacher: Teacher | None
) -> Objective:
    """The objective of a stage before its first step, on the device. The student's weights are, in this order:

    1. `init`: those of a finished stage, or of a file;
    2. `start: teacher`: every weight of the teacher that fits by name and shape, the others fresh; `start: pruned`: in
       place of these inside the units, the teacher's strongest channels;
    3. fresh, drawn from the instance's seed.

    A checkpoint, where there is one, goes over all of them (`Student.start`).
    """
    torch.manual_seed(instance.seed)
    network = build_network(instance.architecture, ctx.data.num_classes)
    network.settle(ctx.recipe.data.resolution)
    if init := instance.init_file:
        load_weights(init.file, network, fresh_classifier=init.classifier == "fresh", prefix=init.prefix)
    elif instance.init:
        load_weights(ctx.run.stage(instance.init).model, network)
    if copy := TAKE_OVER[_start(instance.stage)]:
        assert teacher_network is not None
        copy(network, teacher_network)
    is_weighted = isinstance(instance.stage, LogitsStage) and instance.stage.class_weights
    class_weights = stream.class_weights() if is_weighted else None
    network = ctx.place(network)
    network.freeze_unused(ctx.recipe.data.resolution)
    network = as_trained(network, instance.stage, ctx.recipe.data.resolution)
    objective = build_objective(instance.stage, network, teacher, class_weights)
    if ctx.recipe.compile:
        network.compile_blocks()
    if ctx.recipe.sync_batch_norm:
        objective = synchronised(objective)
    return objective


def _start(stage: Stage) -> str:
    return stage.start if isinstance(stage, TaughtStage) else "fresh"


def load_trained(instance: Instance, run: Run, num_classes: int) -> Network:
    """The finished network of a stage instance, on the CPU: rounded to 8 bits, if it was trained so.

    Raises RunError if the weights are not those trained.

    Draws no random numbers: what is drawn afterwards does not depend on the size of a teacher.
    """
    network = build_unseeded(instance.architecture, num_classes)
    stage_dir = run.stage(instance.key)
    if stage_dir.done:
        stage_dir.check_weights()
    load_weights(stage_dir.model, network)
    known = read_preprocessing(stage_dir.model)
    if not (known and known.quantisation):
        return network
    network.settle(known.resolution)
    try:
        return Quantised(network, known.resolution, **known.quantisation.model_dump())
    except RunError as error:
        raise RunError(f"{stage_dir.model}: {error}") from error


def _load_teacher(instance: Instance, ctx: TrainContext) -> Network:
    assert instance.teacher is not None
    return load_trained(ctx.recipe.instances[instance.teacher], ctx.run, ctx.data.num_classes)


def _build_teacher(network: Network, ctx: TrainContext) -> Teacher:
    network = ctx.place(network)
    network.settle(ctx.recipe.data.resolution)
    return Teacher(network, compiled=ctx.recipe.compile, dtype=COMPUTE_DTYPES[ctx.recipe.precision])


def stored_logits_of(instance: Instance, stream: Stream, ctx: TrainContext, name: str) -> TeacherLogits:
    """The teacher's logits for the stream of a `kl` stage. The teacher is loaded only if they are not stored yet."""
    stage = instance.stage
    assert isinstance(stage, KlStage)
    identity = ctx.identities[instance.key]
    temperature = stage.temperature if stage.top_k else 1.0  # all classes serve every temperature
    metadata = {
        "format": 1,
        **{name: identity[name] for name in ("teacher", "batch_size", "precision", "compile")},
        "data": {**identity["data"], "seed": instance.data_seed},
        **stage.model_dump(mode="json", include={"epochs", "ramp", "top_k"}),
        "temperature": temperature,
        **stage.model_dump(mode="json", include={"mixup", "cutmix"}, exclude_defaults=True),
    }
    rows_per_epoch, val_rows = stream.steps_per_epoch * ctx.recipe.batch_size, ctx.data.val.num_samples
    layout = Layout(stage.epochs, rows_per_epoch, val_rows, ctx.data.num_classes, stage.top_k, temperature)
    teacher = cache(lambda: _build_teacher(_load_teacher(instance, ctx), ctx))

    def source(block: int) -> Iterator[Tensor]:
        for batch in stream.epoch(block) if block < stage.epochs else stream.validation():
            with ctx.autocast():
                logits = teacher().logits(batch[teacher().normalise].images)
            yield logits

    return stored_logits(ctx.run.teacher_logits, metadata, layout, source, ctx.world, name)
