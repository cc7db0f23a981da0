"""What a plan assumes: how much data there is, and what computes with it."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from gowide_dist.data.info import check_split, read_dataset_info
from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.errors import DataError, UserError
from gowide_dist.launch.profile import Device, Profile, Resources, this_machine
from gowide_dist.recipe import Recipe

# Training and validation images and classes, by the usual name of the folder.
KNOWN = {
    "fashion-mnist": (60_000, 10_000, 10),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "imagenet": (1_281_167, 50_000, 1000),
}
JPEGS_PER_S_PER_CPU = 800.0  # of 500 px, decoded, cropped to 224 px: README, `gowide bench --only loader`
NO_LIMIT = 10**9  # minutes, or seconds


class DataSize(NamedTuple):
    """How many images there are, and whether they are JPEGs. `source`: where the numbers are from."""

    train: int
    val: int
    classes: int
    jpegs: bool
    source: str


def data_size(recipe: Recipe, images: int | None = None, classes: int | None = None) -> DataSize:
    """Of the encoded data; of what is given; or of a dataset that is known by its folder's name.

    Raises DataError if none of them says it.
    """
    data = recipe.data
    known = KNOWN.get(data.train.parent.name)
    try:
        info = read_dataset_info(data.train)
        train, val = (check_split(path).samples for path in (data.train, data.val))
        size = DataSize(train, val, len(info.classes), bool(info.encoding.get("jpg_share")), f"{data.train.parent}")
    except DataError as error:
        jpegs = data.augment.crop is not None
        classes = classes or data.classes or (known and known[2])
        if classes is None or (images is None and known is None):
            raise DataError(f"{error}; or tell the plan how large it will be with --images N --classes K") from None
        if known is None:
            return DataSize(images or 0, 0, classes, jpegs, "--images; without validation")
        train, val, _ = known
        size = DataSize(train, val, classes, jpegs, f"{data.train.parent.name} as it is known; it is not encoded yet")
    if images:
        size = size._replace(train=images, source=f"--images; else {size.source}")
    return size._replace(classes=classes or size.classes)


def this_machines_cores(num_processes: int) -> Profile:
    """A profile of this machine: its cores, divided among the processes; no time limit."""
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    memory = available_memory_bytes() / num_processes / 1e9
    return Profile(
        processes_per_node=num_processes,
        cpus_per_task=num_threads,
        timeout_min=NO_LIMIT,
        signal_delay_s=NO_LIMIT,
        device=this_machine(num_threads, memory_gb=memory).model_copy(update={"start_s": 0.0}),
    )


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
    """Images a second and CPU. Raw images cost next to nothing."""
    return device.images_per_s_per_cpu or (JPEGS_PER_S_PER_CPU if size.jpegs else math.inf)
