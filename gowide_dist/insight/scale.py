"""A recipe's chain on 1 to 64 nodes, by arithmetic on stated assumptions. Bytes, seconds and operations throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gowide_dist.errors import UserError
from gowide_dist.insight.assumed import DataSize, decoded_per_s, device_of
from gowide_dist.insight.costs import stage_cost, training_macs
from gowide_dist.insight.plan import FEW_IMAGES_PER_GPU, longest_path, restarts
from gowide_dist.insight.text import duration, listed
from gowide_dist.insight.text import table as text_table
from gowide_dist.launch.profile import Device, Profile, Resources
from gowide_dist.recipe import Instance, Recipe

NODES = (1, 2, 4, 8, 16, 32, 64)
SCALED = Profile(gpus_per_node=8, cpus_per_task=12, timeout_min=1440,
                 device=Device(name="GPU", tflops=312, efficiency=0.2, memory_gb=80))  # fmt: skip


class Work(NamedTuple):
    """A stage, wherever it runs. Operations for a training image, the student's forward and backward."""

    images: float
    student_flops: float
    teacher_flops: float
    validation_flops: float  # of all validation passes
    gradient_bytes: float  # averaged over the processes in every step
    checkpoint_bytes: float


class Times(NamedTuple):
    """Seconds of a stage. communication: not hidden behind the backward pass. data: waiting for images."""

    compute: float
    communication: float
    data: float
    checkpoints: float
    restarts: float


class Row(NamedTuple):
    """The chain with every job on `num_nodes` nodes, independent jobs at the same time: hours along the longest path,
    device hours of all jobs, the computing in these, and what takes the most of the time.
    """

    num_nodes: int
    batch_per_device: float
    hours: float
    device_hours: float
    efficiency: float
    bound: str


def stage_times(
    work: Work,
    nodes: Resources,
    device: Device,
    num_nodes: int,
    batch_size: int,
    images_per_s: float,
    save_every_s: float,
) -> Times:
    """A whole stage. images_per_s: decoded on a node. A restart loses half a checkpoint interval and the start-up.

    One ring goes through all devices at the speed of its slowest link; each device sends and takes 2 (n - 1) / n of the
    bytes (Patarasu and Yuan 2009). At most `device.overlap` of that hides behind the backward pass, two thirds of the
    student's operations.
    """
    num_devices, steps = num_nodes * nodes.tasks_per_node, work.images / batch_size
    local_batch = batch_size / num_devices
    compute = local_batch * (work.student_flops + work.teacher_flops) / device.flops
    slowest_gb_s = min(device.within_node_gb_s, device.between_nodes_gb_s if num_nodes > 1 else math.inf)
    ring = 2 * (num_devices - 1) / num_devices * work.gradient_bytes / (1e9 * slowest_gb_s)
    exposed = ring - min(device.overlap * ring, 2 / 3 * local_batch * work.student_flops / device.flops)
    data = max(0.0, batch_size / (num_nodes * images_per_s) - compute - exposed)
    computing = steps * compute + work.validation_flops / (num_devices * device.flops)
    training = computing + steps * (exposed + data)
    saving = training // save_every_s * work.checkpoint_bytes / (1e9 * device.write_gb_s)
    timeout_s = 60 * nodes.timeout_min
    lost = min(save_every_s, timeout_s) / 2 + device.start_s
    again = restarts(device.start_s + training + saving, timeout_s, lost)
    return Times(computing, steps * exposed, steps * data, saving, device.start_s + (again and again * lost))


def scale(recipe: Recipe, size: DataSize, profile: Profile | None = None) -> tuple[dict[str, str], list[Row]]:
    """The chain on 1 to 64 nodes of the profile's kind (default: 8 GPUs), and what was assumed."""
    nodes = profile or SCALED
    device, num_devices, batch_size = device_of(nodes), nodes.tasks_per_node, recipe.batch_size
    if batch_size < num_devices:
        raise UserError(f"batch_size: {batch_size} images are fewer than the {num_devices} devices of a node")
    images_per_s = decoded_per_s(size, device) * nodes.cpus_per_task * num_devices
    save_every_s = 60 * (recipe.checkpoints.every_minutes or nodes.timeout_min)
    work = {key: _work(instance, recipe, size) for key, instance in recipe.instances.items()}
    parents = {key: instance.parents for key, instance in recipe.instances.items()}
    rows = []
    for n in (n for n in NODES if n * num_devices <= batch_size):
        times = {
            key: stage_times(job, nodes, device, n, batch_size, images_per_s, save_every_s) for key, job in work.items()
        }
        parts = Times(*map(sum, zip(*times.values(), strict=True)))
        longest_s = longest_path({key: sum(stage) for key, stage in times.items()}, parents)[1]
        bound = Times._fields[parts.index(max(parts))]
        device_h = sum(parts) * n * num_devices / 3600
        rows.append(Row(n, batch_size / n / num_devices, longest_s / 3600, device_h, parts.compute / sum(parts), bound))
    most = f", so that {rows[-1].num_nodes} nodes are the most" if rows[-1].num_nodes < NODES[-1] else ""
    decoded = f"{images_per_s:,.0f} images/s" if math.isfinite(images_per_s) else "fast enough"
    return {
        "data": f"{size.train:,} training and {size.val:,} validation images ({size.source})",
        "batch": f"{batch_size} images on all devices together{most}",
        "device": f"{device.name}, {device.tflops:g} TFLOP/s x {device.efficiency:g} reached, whatever its batch",
        "node": f"{num_devices} devices; decodes {decoded}",
        "gradients": "4 bytes a trained parameter; one ring, 2 (n - 1) / n x bytes / slowest link",
        "links": f"{device.within_node_gb_s:g} GB/s in a node, {device.between_nodes_gb_s:g} GB/s between nodes",
        "overlap": f"{device.overlap:.0%} of the ring's time at most, no longer than the backward pass",
        "checkpoints": f"every {save_every_s / 60:,.0f} minutes, {device.write_gb_s:g} GB/s, training waits",
        "restarts": f"every {nodes.timeout_min / 60:g} hours; lose half a checkpoint interval and {device.start_s:g} s",
        "jobs": "each on all the nodes of its row; independent ones at the same time; no waiting in the queue",
    }, rows


def _work(instance: Instance, recipe: Recipe, size: DataSize) -> Work:
    macs, cost = training_macs(instance, recipe, size.classes), stage_cost(instance, recipe, size.classes)
    epochs = instance.stage.epochs
    return Work(
        images=size.train // recipe.batch_size * recipe.batch_size * epochs,
        student_flops=2 * macs.student,
        teacher_flops=2 * macs.teacher,
        validation_flops=2 * (epochs // recipe.eval_every_epochs or 1) * size.val * cost.validation.total,
        gradient_bytes=4 * cost.trained,
        checkpoint_bytes=8 * cost.weights,
    )


def table(assumptions: dict[str, str], rows: Sequence[Row]) -> str:
    """The rows as lines of text."""
    lines = [
        (
            f"{row.num_nodes}", f"{row.batch_per_device:g}", duration(row.hours), duration(row.device_hours),
            f"{row.efficiency:.0%}", row.bound,
            f"fewer than {FEW_IMAGES_PER_GPU} images a device" if row.batch_per_device < FEW_IMAGES_PER_GPU else "",
        )
        for row in rows
    ]  # fmt: skip
    head = ("nodes", "batch/device", "time", "device time", "efficiency", "bound by", "")
    return f"assumed, not measured\n{listed(assumptions)}\n\n{text_table(head, lines, left=(5, 6))}"
