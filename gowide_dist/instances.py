"""Stage instances, one for each network of a stage, and the checks of the graph that they form. Imports no torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from operator import gt, ne
from typing import NamedTuple

from gowide_dist.errors import RecipeError
from gowide_dist.networks.architecture import Structure
from gowide_dist.networks.foreign import Foreign, Own, Settings, normalise_of
from gowide_dist.networks.normalise import Normalise
from gowide_dist.stages import BlocksStage, File, KlStage, LogitsStage, Stage, TaughtStage


class Instance(NamedTuple):
    """One stage for one network: what is trained, stored and fingerprinted. Other instances are named by their key.

    The same instance elsewhere: `StageDir` is its folder, `Done` its result, `StagePlan` its expected cost,
    `StageStatus` its progress and its job, `RunResults.rows` has its row in a report.
    """

    stage_name: str
    network_name: str
    stage: Stage
    architecture: Settings
    seed: int
    data_seed: int  # of order and augmentation
    init: str | None  # the instance that gives the weights at the start,
    init_file: File | None  # or the file that does
    teacher: str | None  # the instance that teaches this one

    @property
    def key(self) -> str:
        """`stage/network`: the name on the command line, and the folder under `stages/`."""
        return f"{self.stage_name}/{self.network_name}"

    @property
    def normalise(self) -> Normalise:
        """How its images are normalised; may import timm."""
        return normalise_of(self.architecture)

    @property
    def parents(self) -> tuple[str, ...]:
        """The instances whose weights this one needs."""
        return tuple(dict.fromkeys(key for key in (self.init, self.teacher) if key))

    @property
    def teacher_stream(self) -> tuple[Hashable, ...]:
        """Equal for instances that need the same outputs of the same teacher."""
        stage = self.stage
        stream = self.teacher, self.data_seed, stage.epochs, stage.ramp
        if not isinstance(stage, KlStage):
            return (stage.objective, *stream)
        kept = stage.top_k, stage.temperature if stage.top_k else None
        return (stage.objective, *stream, stage.mixup, stage.cutmix, *kept)


def check_parents(instance: Instance, instances: Mapping[str, Instance]) -> None:
    """Raises RecipeError unless the weights of `init` and the blocks of the teacher fit the instance's network."""
    student, stage = instance.architecture, instance.stage
    option, network = f"stages.{instance.stage_name}", f"network '{instance.network_name}'"
    if instance.init and (init := instances[instance.init].architecture) != student:
        is_same = init.model_copy(update={"normalise": student.normalise}) == student
        what = "normalisation" if is_same else "architecture"
        raise RecipeError(f"{option}.init: {instance.init} has another {what} than {network}")
    if not isinstance(stage, TaughtStage):
        return
    assert instance.teacher is not None, "a stage that is taught names its teacher"
    teacher = instances[instance.teacher].architecture
    if isinstance(student, Foreign) or isinstance(teacher, Foreign):
        _check_foreign(instance, stage, teacher)
        return
    if isinstance(stage, BlocksStage) and student.reductions != teacher.reductions:
        sides = [", ".join(f"1/{reduction}" for reduction in each.reductions) for each in (teacher, student)]
        raise RecipeError(
            f"{option}.teacher: the blocks of {instance.teacher} ({teacher.num_blocks} blocks, {teacher.stem} stem) "
            f"do not match those of {network} ({student.num_blocks} blocks, {student.stem} stem): their sides are "
            f"{sides[0]} and {sides[1]} of the images'"
        )
    takes_head = isinstance(stage, BlocksStage) and stage.classifier == "teacher"
    if takes_head and student.head_channels != teacher.head_channels:
        theirs, own = (f"{each.head_channels or 'no'} channels" for each in (teacher, student))
        raise RecipeError(
            f"{option}.classifier: the 1x1 convolution behind the blocks of {instance.teacher} ({theirs}) does not fit "
            f"{network} ({own}); take classifier: fresh"
        )
    if isinstance(stage, BlocksStage) and len(stage.block_weights) not in (0, student.num_blocks):
        given = len(stage.block_weights)
        raise RecipeError(f"{option}.block_weights: has {given} weights, but {network} has {student.num_blocks} blocks")
    is_alike = (teacher.reductions, teacher.block_channels) == (student.reductions, student.block_channels)
    if isinstance(stage, KlStage) and stage.blocks_weight and not is_alike:
        theirs, own = (f"{each.stem} stem, channels {list(each.block_channels)}" for each in (teacher, student))
        raise RecipeError(
            f"{option}.blocks_weight: the blocks of {instance.teacher} ({theirs}) and of {network} ({own}) differ; "
            "leave blocks_weight out"
        )
    if stage.start != "fresh":
        _check_start(instance, stage, instances[instance.teacher])


def _check_foreign(instance: Instance, stage: TaughtStage, teacher: Settings) -> None:
    """Raises RecipeError if a stage asks for more than can be done where student or teacher is another's network.

    Whether their blocks fit is seen when they are built (`train.fit`).
    """
    student, option = instance.architecture, f"stages.{instance.stage_name}"
    if stage.start != "fresh":
        raise RecipeError(f"{option}.start: {stage.start} is for networks of ours; take start: fresh, or init")
    if isinstance(stage, BlocksStage) and isinstance(student, Foreign) and not isinstance(student, Own):
        raise RecipeError(
            f"{option}.train: {student} cannot be walked block by block; a student of blocks is a network of ours, or "
            "one of your own (docs/networks.md)"
        )
    if isinstance(stage, BlocksStage) and stage.classifier == "teacher":
        other = student if isinstance(student, Foreign) else teacher
        raise RecipeError(f"{option}.classifier: that of {other} fits no other network; take classifier: fresh")
    if isinstance(stage, KlStage) and stage.blocks_weight and isinstance(student, Foreign):
        raise RecipeError(f"{option}.blocks_weight: {student} gives no outputs of blocks; leave it out")


def _check_start(instance: Instance, stage: TaughtStage, taught_by: Instance) -> None:
    """Raises RecipeError unless an instance can start from its teacher's weights in the way that its stage says."""
    student, teacher = instance.architecture, taught_by.architecture
    assert isinstance(student, Structure) and isinstance(teacher, Structure), "see `_check_foreign`"
    option, network = f"stages.{instance.stage_name}.start", f"network '{instance.network_name}'"
    is_related = type(student) is type(teacher)
    if not is_related or (stage.start == "pruned" and student.unit != teacher.unit):
        raise RecipeError(
            f"{option}: {taught_by.key} has {teacher.unit} units and {network} {student.unit} units, whose "
            f"inner channels do not correspond; take start: {'teacher or fresh' if is_related else 'fresh'}"
        )
    if (student.stem, student.first_channels) != (teacher.stem, teacher.first_channels):
        raise RecipeError(
            f"{option}: the stem of {taught_by.key} ({teacher.stem}, {teacher.first_channels} channels) does "
            f"not fit {network} ({student.stem}, {student.first_channels}); take start: fresh, or reduce its width "
            "instead of its channels"
        )
    if student.normalise != teacher.normalise:
        raise RecipeError(
            f"{option}: the weights of {taught_by.key} expect another normalisation than that of {network}; "
            f"say the same in networks.{instance.network_name}.normalise, or take start: fresh"
        )
    if stage.start == "pruned" and any(map(ne, student.block_channels, teacher.block_channels)):
        theirs, own = (list(each.block_channels) for each in (teacher, student))
        raise RecipeError(
            f"{option}: the blocks of {taught_by.key} pass on {theirs} channels and those of {network} {own}, which "
            "no pruning changes; take start: teacher or fresh, or reduce its width instead of its channels"
        )
    if stage.start == "pruned" and any(map(gt, student.inner_channels, teacher.inner_channels)):
        raise RecipeError(
            f"{option}: {network} has more inner channels {list(student.inner_channels)} than {taught_by.key} "
            f"{list(teacher.inner_channels)}, so that there is nothing to prune; take start: teacher or fresh"
        )


def check_classifier(instance: Instance, instances: Mapping[str, Instance]) -> None:
    """Raises RecipeError if an instance learns from a classifier that was drawn at random and never trained."""
    source, stage = instances.get(instance.teacher or ""), instance.stage
    if not source or source.stage.epochs or not source.init_file or source.init_file.classifier == "file":
        return
    if isinstance(stage, KlStage) or (isinstance(stage, BlocksStage) and stage.classifier == "teacher"):
        own = ", or take classifier: fresh here" if isinstance(stage, BlocksStage) else ""
        fault = f"the classifier of {source.key} is drawn at random (classifier: fresh) and never trained (epochs: 0)"
        raise RecipeError(f"stages.{instance.stage_name}.teacher: {fault}; train it for some epochs{own}")


def check_teacher_bits(instance: Instance, instances: Mapping[str, Instance]) -> None:
    """Raises RecipeError if the teacher was trained in 8 bits."""
    source = instances.get(instance.teacher or "")
    if source and isinstance(source.stage, LogitsStage) and source.stage.quantised:
        better = source.init or "a network of full precision"
        fault = f"{source.key} is trained to be rounded to 8 bits (quantised)"
        raise RecipeError(f"stages.{instance.stage_name}.teacher: {fault}; learn from {better}")


def in_order(instances: Mapping[str, Instance]) -> dict[str, Instance]:
    """Parents before children, otherwise in the order of the recipe. Raises RecipeError on a cycle."""
    ordered: dict[str, Instance] = {}
    while waiting := [instance for key, instance in instances.items() if key not in ordered]:
        ready = next((instance for instance in waiting if ordered.keys() >= {*instance.parents}), None)
        if ready is None:
            raise RecipeError(f"stages: dependency cycle among {', '.join(instance.key for instance in waiting)}")
        ordered[ready.key] = ready
    return ordered
