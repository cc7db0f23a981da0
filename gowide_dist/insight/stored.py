"""Teacher outputs that students share: who computes them, who finds them known, and what storing them saves."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

from gowide_dist.insight.assumed import DataSize, device_of
from gowide_dist.insight.costs import training_macs
from gowide_dist.insight.text import duration, gigabytes
from gowide_dist.launch.profile import Profile
from gowide_dist.recipe import Instance, KlStage, Recipe

TOP_K = 10  # suggested where there are more than a hundred classes


def known_outputs(recipe: Recipe, progress: Mapping[str, str | int], *, together: bool) -> set[str]:
    """Instances that find their teacher's outputs stored, or computed for another instance of their stage.

    together: instances of a stage train in one pass, as under `gowide run`.
    """
    known: set[str] = set()
    asked: set[Hashable] = set()
    for key in sorted(recipe.instances, key=lambda key: not isinstance(progress.get(key), str)):  # done ones first
        instance, is_done = recipe.instances[key], isinstance(progress.get(key), str)
        if isinstance(instance.stage, KlStage) and instance.stage.teacher_logits == "stored":
            stream: Hashable = _stream(instance)
        elif together and not is_done:
            stream = instance.stage_name
        else:
            continue
        if stream in asked or is_done:
            known.add(key)
        asked.add(stream)
    return known


def notes(recipe: Recipe, size: DataSize, profile: Profile) -> Iterator[str]:
    """Where students ask one teacher about the same images: what storing its outputs saves, or would save."""
    groups: dict[Hashable, list[Instance]] = {}
    for instance in recipe.instances.values():
        if isinstance(instance.stage, KlStage) and instance.stage.epochs:
            groups.setdefault(_stream(instance), []).append(instance)
    for students in groups.values():
        instance, count = students[0], len(students)
        stage = instance.stage
        assert isinstance(stage, KlStage)
        images_per_epoch = size.train // recipe.batch_size * recipe.batch_size
        images = stage.epochs * images_per_epoch
        macs = training_macs(instance, recipe, size.classes)
        once = images * 2 * macs.teacher / device_of(profile.resources(instance)).flops / 3600
        saved = f"{duration((count - 1) * once)} of {duration(count * once)} on all devices"
        top_k = stage.top_k or (TOP_K if stage.teacher_logits == "live" and size.classes > 100 else None)
        row = 2 * (top_k + 1) + (2 if size.classes <= 2**15 else 4) * top_k if top_k else 2 * size.classes
        kept = f"{top_k} best" if top_k else f"all {size.classes}"
        rows = f"{stage.epochs} epochs x {images_per_epoch:,} images x {row} bytes"
        file = f"{gigabytes(images * row)} ({rows}, {kept} classes)"
        names = ", ".join(student.key for student in students)
        if stage.teacher_logits == "stored":
            yield f"{names}: {instance.teacher}'s outputs are stored once, {file}; that saves {saved}"
        else:
            yield (
                f"{names}: {macs.teacher / macs.total:.0%} of a step is {instance.teacher}'s outputs; "
                f"teacher_logits: stored would save {saved if count > 1 else 'nothing yet'}, {duration(once)} for each "
                f"further student or seed of the same stream, for {file}"
            )


def _stream(instance: Instance) -> tuple[Hashable, ...]:
    """Equal for stages that ask one teacher about the same images, and keep as much of its outputs."""
    stage = instance.stage
    kept = (stage.top_k, stage.temperature if stage.top_k else None) if isinstance(stage, KlStage) else ()
    return (stage.objective, instance.teacher, instance.data_seed, stage.epochs, stage.ramp, *kept)
