"""What a plan assumes: how much data there is, what computes with it, and which teacher outputs are stored."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

from gowide_dist.data.info import check_split, read_dataset_info
from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.errors import DataError, UserError
from gowide_dist.insight.text import duration, gigabytes
from gowide_dist.instances import Instance
from gowide_dist.launch.profile import Device, Profile, Resources, this_machine
from gowide_dist.machine import num_cores
from gowide_dist.prepare import check_data
from gowide_dist.recipe import Recipe
from gowide_dist.stages import KlStage
from gowide_dist.train.costs import training_macs

# Training and validation images and classes, by the usual name of the folder.
KNOWN = {
    "fashion-mnist": (60_000, 10_000, 10),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "imagenet": (1_281_167, 50_000, 1000),
}
JPEGS_PER_S_PER_CPU = 800.0  # of 500 px, decoded, cropped to 224 px: README, `gowide bench --only loader`
NO_LIMIT = 10**9  # minutes, or seconds
TOP_K = 10  # stored logits, suggested where there are more than a hundred classes


@dataclass(frozen=True)
class DataSize:
    """How many images there are, and whether they are JPEGs. `source`: where the numbers are from."""

    train: int
    val: int
    classes: int
    jpegs: bool
    source: str


def data_size(recipe: Recipe, images: int | None = None, classes: int | None = None) -> DataSize:
    """Of the encoded data, or of a dataset that is known by its folder's name; `images` and `classes` replace theirs.

    Raises DataError if none of them says it, UserError if the recipe does not fit the encoded data.
    """
    data, folder = recipe.data, recipe.data.train.parent
    try:
        info = read_dataset_info(data.train)
        train, val = (check_split(path).samples for path in (data.train, data.val))
        size = DataSize(train, val, len(info.classes), bool(info.encoding.get("jpg_share")), f"{folder}")
    except DataError as error:
        train, val, known_classes = KNOWN.get(folder.name, (images or 0, 0, data.classes or classes or 0))
        if not (train and known_classes):
            raise DataError(f"{error}; or give its size with --images N --classes K") from None
        size = DataSize(train, val, known_classes, data.augment.crop is not None, f"{folder.name}, not encoded yet")
    else:
        if classes not in (None, size.classes):
            raise DataError(f"--classes {classes}: {folder} has {size.classes}; leave the option out")
        if not images:
            check_data(recipe)  # `run` would refuse it too
    source = f"--images; else {size.source}" if images else size.source
    return replace(size, train=images or size.train, classes=classes or size.classes, source=source)


def this_machines_cores(num_processes: int) -> Profile:
    """A profile of this machine: its cores, divided among the processes; no time limit."""
    num_threads = max(1, num_cores() // num_processes)
    device = this_machine(num_threads, memory_gb=available_memory_bytes() / num_processes / 1e9)
    return Profile(
        processes_per_node=num_processes,
        cpus_per_task=num_threads,
        timeout_min=NO_LIMIT,
        signal_delay_s=NO_LIMIT,
        device=device.model_copy(update={"start_s": 0.0}),
    )


def is_this_machine(profile: Profile) -> bool:
    """Whether a profile is of `this_machines_cores`, without jobs and their limits."""
    return profile.timeout_min == NO_LIMIT


def device_of(resources: Resources) -> Device:
    """What a process computes with. Raises UserError if a profile with GPUs does not say it."""
    if resources.device:
        return resources.device
    if resources.gpus_per_node:
        raise UserError(
            "the cluster profile does not say how fast its GPUs are; "
            "add for example device: {name: H100, tflops: 400, efficiency: 0.3, memory_gb: 80}"
        )
    memory = resources.mem_gb / resources.tasks_per_node if resources.mem_gb else None
    return this_machine(resources.cpus_per_task, memory_gb=memory)


def decoded_per_s(size: DataSize, device: Device) -> float:
    """Images decoded per second and CPU; infinite for raw images, which cost next to nothing."""
    return device.images_per_s_per_cpu or (JPEGS_PER_S_PER_CPU if size.jpegs else math.inf)


def known_outputs(recipe: Recipe, done: Collection[str], jobs: Iterable[Iterable[Instance]]) -> set[str]:
    """Instances whose teacher does not run: its outputs are stored, or computed for another instance of the job."""
    job_of = {instance.key: number for number, job in enumerate(jobs) for instance in job}
    known: set[str] = set()
    computed: set[Hashable] = set()
    for key in sorted(recipe.instances, key=lambda key: key not in done):  # done ones have stored theirs
        instance = recipe.instances[key]
        if instance.stage.has_stored_logits:
            outputs: Hashable = instance.teacher_stream
        elif key not in done:
            outputs = job_of[key]
        else:
            continue
        if outputs in computed:
            known.add(key)
        computed.add(outputs)
    return known


def notes_on_logits(recipe: Recipe, instances: Iterable[Instance], size: DataSize, profile: Profile) -> Iterator[str]:
    """For unfinished students of one teacher on the same images: what storing its outputs saves, or would save."""
    groups: dict[Hashable, list[Instance]] = {}
    for instance in instances:
        if isinstance(instance.stage, KlStage) and instance.stage.epochs and not instance.stage.blocks_weight:
            groups.setdefault(instance.teacher_stream, []).append(instance)
    for students in groups.values():
        instance, stage = students[0], students[0].stage
        assert isinstance(stage, KlStage)
        is_stored, num_classes = all(student.stage.has_stored_logits for student in students), size.classes
        if (count := len(profile.jobs(students))) == 1:  # they train in one pass
            continue
        images_per_epoch = size.train // recipe.batch_size * recipe.batch_size
        images = stage.epochs * images_per_epoch
        macs = training_macs(instance, recipe, num_classes)
        once = images * 2 * macs.teacher / device_of(profile.resources(instance)).flops / 3600
        top_k = stage.top_k or (None if is_stored or stage.needs_all_classes or num_classes <= 100 else TOP_K)
        row = 2 * (top_k + 1) + (2 if num_classes <= 2**15 else 4) * top_k if top_k else 2 * num_classes
        rows = f"{stage.epochs} epochs x {images_per_epoch:,} images x {row} bytes"
        yield (
            f"{', '.join(student.key for student in students)}: {macs.teacher / macs.total:.0%} of a step is "
            f"{instance.teacher}'s outputs; stored once{'' if is_stored else ', by teacher_logits: stored'}, they save "
            f"{duration((count - 1) * once)} of {duration(count * once)} on all devices, and {duration(once)} for each "
            f"further student or seed of the same stream, for {gigabytes(images * row)} "
            f"({rows}, {f'{top_k} best' if top_k else f'all {num_classes}'} classes)"
        )
