"""A recipe's chain simulated on 1 to 64 nodes: what `simulate` is told, and its table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gowide_dist.errors import UserError
from gowide_dist.insight.advice import FEW_IMAGES_PER_GPU
from gowide_dist.insight.assumed import DataSize, decoded_per_s, device_of
from gowide_dist.insight.costs import training_macs, validation_macs
from gowide_dist.insight.simulate import Cluster, Simulated, Work, simulate
from gowide_dist.insight.text import columns, duration, listed
from gowide_dist.launch.profile import Device, Profile, Resources
from gowide_dist.recipe import BlocksStage, Instance, Recipe

NODES = (1, 2, 4, 8, 16, 32, 64)
SCALED = Profile(gpus_per_node=8, cpus_per_task=12, timeout_min=1440,
                 device=Device(name="GPU", tflops=312, efficiency=0.2, memory_gb=80))  # fmt: skip


def scale(recipe: Recipe, size: DataSize, profile: Profile | None = None) -> tuple[dict[str, str], list[Simulated]]:
    """The chain simulated on 1 to 64 nodes of the profile's kind (default: 8 GPUs), and what was assumed."""
    profile = profile or SCALED
    device = device_of(profile, is_cluster=True)
    cluster = cluster_of(profile, device, size, recipe)
    work = {key: work_of(instance, recipe, size) for key, instance in recipe.instances.items()}
    most = recipe.batch_size // cluster.devices_per_node
    rows = [simulate(work, cluster, nodes, recipe.batch_size) for nodes in NODES if nodes <= most]
    if not rows:
        raise UserError(
            f"batch_size: {recipe.batch_size} images are fewer than the {cluster.devices_per_node} devices of a node"
        )
    every = cluster.checkpoint_every_s
    assumptions = {
        "data": f"{size.train:,} training and {size.val:,} validation images ({size.source})",
        "batch": f"{recipe.batch_size} images on all devices together"
        + (f", so that {rows[-1].num_nodes} nodes are the most" if rows[-1].num_nodes < NODES[-1] else ""),
        "device": f"{device.name}, {device.tflops:g} TFLOP/s x {device.efficiency:g} reached, whatever its batch",
        "node": f"{cluster.devices_per_node} devices; decodes "
        + (f"{cluster.images_s_per_node:,.0f} images/s" if math.isfinite(cluster.images_s_per_node) else "fast enough"),
        "gradients": "4 bytes a trained parameter; one ring, 2 (n - 1) / n x bytes / slowest link",
        "links": f"{device.within_node_gb_s:g} GB/s in a node, {device.between_nodes_gb_s:g} GB/s between nodes",
        "overlap": f"{device.overlap:.0%} of the ring's time at most, no longer than the backward pass",
        "checkpoints": f"every {every / 60:,.0f} minutes, {device.write_gb_s:g} GB/s, training waits",
        "restarts": f"every {cluster.timeout_s / 3600:g} hours; each loses half a checkpoint interval and "
        f"{device.start_s:g} s",
        "jobs": "each on all the nodes of its row; independent ones at the same time; no waiting in the queue",
    }
    return assumptions, rows


def cluster_of(profile: Resources, device: Device, size: DataSize, recipe: Recipe) -> Cluster:
    """The profile's nodes as the simulation takes them."""
    every = recipe.checkpoints.every_minutes
    timeout_s = 60.0 * profile.timeout_min
    return Cluster(
        devices_per_node=profile.tasks_per_node,
        device_flops=device.flops,
        within_node_bytes_s=1e9 * device.within_node_gb_s,
        between_nodes_bytes_s=1e9 * device.between_nodes_gb_s,
        overlap=device.overlap,
        images_s_per_node=decoded_per_s(size, device) * profile.cpus_per_task * profile.tasks_per_node,
        write_bytes_s=1e9 * device.write_gb_s,
        start_s=device.start_s,
        timeout_s=timeout_s,
        checkpoint_every_s=60 * every if every else timeout_s,
    )


def work_of(instance: Instance, recipe: Recipe, size: DataSize) -> Work:
    """A stage as the simulation takes it. Bottom-up imitation averages the gradients of one block at a time."""
    macs = training_macs(instance, recipe, size.classes)
    epochs = instance.stage.epochs
    images = size.train // recipe.batch_size * recipe.batch_size * epochs
    parameters = instance.architecture.num_parameters(size.classes)
    trained = parameters
    if isinstance(instance.stage, BlocksStage) and instance.stage.order == "bottom-up":
        trained //= instance.architecture.num_blocks
    evaluations = epochs // recipe.eval_every_epochs or 1
    return Work(
        images=images,
        student_flops=2 * macs.student,
        teacher_flops=2 * macs.teacher,
        validation_flops=2.0 * evaluations * size.val * validation_macs(instance, recipe, size.classes),
        gradient_bytes=4 * trained,
        checkpoint_bytes=8 * parameters,
        parents=instance.parents,
    )


def table(assumptions: dict[str, str], rows: Sequence[Simulated]) -> str:
    """The simulation as lines of text."""
    lines = [("nodes", "batch/device", "time", "device time", "efficiency", "bound by", "")]
    for row in rows:
        note = f"fewer than {FEW_IMAGES_PER_GPU} images a device" if row.batch_per_device < FEW_IMAGES_PER_GPU else ""
        lines.append(
            (
                str(row.num_nodes), f"{row.batch_per_device:g}", duration(row.hours), duration(row.device_hours),
                f"{row.efficiency:.0%}", row.bound, note,
            )
        )  # fmt: skip
    return f"assumed, not measured\n{listed(assumptions)}\n\n{columns(lines, left=(5, 6))}"
