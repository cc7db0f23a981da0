"""Settings of a recipe that are valid and yet without effect: `plan` tells them, and `run` and `submit` at their start.

They are told, not refused: a trial of one epoch keeps the schedule of ninety.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from gowide_dist.instances import Instance
from gowide_dist.recipe import Data, Recipe
from gowide_dist.stages import KlStage, LabelsStage, LogitsStage, Optim, Ramp, Schedule, Stage
from gowide_dist.timeline import Batching, Timeline

_OF_TRAINING = ("optim", "schedule", "ramp", "mixup", "cutmix", "label_smoothing", "class_weights")


def without_effect(recipe: Recipe, instances: Collection[Instance], num_images: int) -> list[str]:
    """A line for each such setting of the instances: its key, and why it does nothing. num_images: to train on."""
    lines = list(_of_data(recipe.data)) if instances else []
    for instance in instances:
        stage, num_phases = instance.stage, instance.stage.num_phases(instance.architecture.num_blocks)
        batching, steps_per_epoch = Batching(recipe.batch_size), num_images // recipe.batch_size
        timeline = Timeline(batching, steps_per_epoch, stage.epochs, num_phases)
        if recipe.sync_batch_norm and isinstance(stage, LogitsStage) and stage.quantised:
            lines.append(f"sync_batch_norm: has no effect on {instance.stage_name}, which is quantised")
        of_stage = [*_of_stage(stage, timeline, recipe.data.resolution), *_of_start(instance, recipe)]
        lines += [f"stages.{instance.stage_name}.{line}" for line in of_stage]
    return [*dict.fromkeys(lines)]  # networks of one stage say the same


def _of_data(data: Data) -> Iterator[str]:
    if data.augment.translate and data.augment.crop:
        yield "data.augment.translate: has no effect beside crop, which draws the position already"
    if data.val.resolve() == data.train.resolve():
        yield "data.val: is the file of the training images: accuracies will be those of training"


def _of_start(instance: Instance, recipe: Recipe) -> Iterator[str]:
    """What the weights that a stage starts from leave without effect."""
    stage, teacher = instance.stage, recipe.instances.get(instance.teacher or "")
    if instance.init_file and instance.init_file.classifier == "fresh" and not stage.epochs:
        yield "init.classifier: fresh stays as it is drawn, for epochs: 0: its blocks are of use, its logits are not"
    if teacher is None or not stage.epochs:
        return
    takes_all = getattr(stage, "start", "fresh") != "fresh" and teacher.architecture == instance.architecture
    is_rounded = isinstance(stage, LogitsStage) and stage.quantised
    if takes_all or (instance.init == teacher.key and not is_rounded):
        yield "teacher: its weights are those that the stage starts from: they agree before the first step"


def _of_stage(stage: Stage, timeline: Timeline, resolution: int) -> Iterator[str]:
    if not stage.epochs:
        fields = type(stage).model_fields
        given = [name for name in _OF_TRAINING if name in fields and getattr(stage, name) != fields[name].default]
        if given:
            yield f"epochs: 0 trains nothing, so that {', '.join(given)} has no effect"
        return
    if not len(timeline.phase(0)):
        steps = timeline.total_steps
        yield f"epochs: its {steps} steps are fewer than its {timeline.num_phases} blocks, some of which never train"
        return
    assert stage.optim is not None, "a stage that trains has an optim"
    yield from _of_schedule(stage.schedule, timeline)
    yield from _of_optim(stage.optim, timeline)
    yield from _of_ramp(stage.ramp, stage.epochs, resolution) if stage.ramp else ()
    if isinstance(stage, LabelsStage) and stage.label_smoothing == 1:
        yield "label_smoothing: 1 leaves nothing of the labels: the same target for every image"
    if isinstance(stage, KlStage) and stage.labels_weight == 1:
        yield f"labels_weight: 1 leaves no weight to the teacher's logits: loss: {stage.loss} has no effect"


def _span(timeline: Timeline) -> str:
    """What a schedule spans, the shortest phase."""
    epochs, per = timeline.epochs / timeline.num_phases, "the stage has" if timeline.num_phases == 1 else "a block has"
    return f"{per} {epochs:.3g} epoch{'' if epochs == 1 else 's'}"


def _of_schedule(schedule: Schedule, timeline: Timeline) -> Iterator[str]:
    last = len(timeline.phase(0)) - 1
    warmup = schedule.warmup_epochs * timeline.steps_per_epoch
    if warmup > last:
        yield (
            f"schedule.warmup_epochs: {schedule.warmup_epochs:g}, but {_span(timeline)}: the learning rate never "
            "reaches lr, and does not decay"
        )
        return
    late = [f"{at:g}" for at in schedule.milestones if at * timeline.steps_per_epoch > last]
    early = [f"{at:g}" for at in schedule.milestones if at < schedule.warmup_epochs]
    if late:
        yield f"schedule.milestones: {', '.join(late)} never come, for {_span(timeline)}"
    if early:
        yield (
            f"schedule.milestones: {', '.join(early)} fall into the warm-up of {schedule.warmup_epochs:g} epochs, "
            "after which the learning rate is reduced at once"
        )
    if schedule.decay != "step" and schedule.factor != Schedule().factor:
        yield f"schedule.factor: belongs to milestones; decay: {schedule.decay} has no use for it"
    if schedule.decay == "step" and schedule.factor in (0, 1):
        yield f"schedule.factor: {schedule.factor:g} " + (
            "leaves the learning rate as it is at every milestone" if schedule.factor else "ends all learning there"
        )


def _of_optim(optim: Optim, timeline: Timeline) -> Iterator[str]:
    if not (optim.decay_norms or optim.weight_decay):
        yield "optim.decay_norms: has no effect without weight_decay"
    steps = len(timeline.phase(0))
    if optim.ema and (window := round(1 / (1 - optim.ema))) > steps:
        yield (
            f"optim.ema: {optim.ema:g} averages over {window:,} steps, but {_span(timeline)} of {steps:,} steps: the "
            "average's warm-up does not reach it, and a smaller one would do the same"
        )


def _of_ramp(ramp: Ramp, epochs: int, resolution: int) -> Iterator[str]:
    sides, end = [ramp.side(epoch, resolution) for epoch in range(epochs)], ramp.end_px or resolution
    if sides[0] == resolution:
        yield f"ramp.start_px: {ramp.start_px} is the resolution: no image grows"
    elif sides[-1] < end:
        yield (
            f"ramp.until_epoch: {ramp.until_epoch}, but the stage's epochs are {epochs}: its images reach "
            f"{sides[-1]} of {end} px"
        )
