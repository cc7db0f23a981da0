"""A recipe's chain on 1 to 64 nodes, by arithmetic on stated assumptions. Bytes, seconds and operations throughout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gowide_dist.errors import UserError
from gowide_dist.insight.assumed import DataSize, decoded_per_s, device_of
from gowide_dist.insight.plan import longest_path
from gowide_dist.insight.plan_warnings import FEW_IMAGES_PER_GPU
from gowide_dist.insight.stage_plan import restarts
from gowide_dist.insight.text import duration, listed, table
from gowide_dist.instances import Instance
from gowide_dist.launch.profile import Device, Profile, Resources
from gowide_dist.recipe import Recipe
from gowide_dist.train.costs import stage_cost, training_macs

NODES = (1, 2, 4, 8, 16, 32, 64)
EIGHT_GPUS = Profile(gpus_per_node=8, cpus_per_task=12, timeout_min=1440,
                     device=Device(name="GPU", tflops=312, efficiency=0.2, memory_gb=80))  # fmt: skip


def stage_seconds(
    instance: Instance, recipe: Recipe, size: DataSize, nodes: Resources, num_nodes: int
) -> dict[str, float]:
    """A whole stage on `num_nodes` nodes, by what takes the time.

    communication: one ring through all devices at the speed of its slowest link, in which each device sends and takes
    2 (n - 1) / n of the bytes (Patarasu and Yuan 2009), where it is not hidden behind the backward pass, as at most
    `device.overlap` of it is. restarts: the start-up, and at each time limit again, with half a checkpoint interval.
    """
    macs, cost = training_macs(instance, recipe, size.classes), stage_cost(instance, recipe, size.classes)
    device, epochs, num_devices = device_of(nodes), instance.stage.epochs, num_nodes * nodes.tasks_per_node
    steps, local_batch = epochs * (size.train // recipe.batch_size), recipe.batch_size / num_devices
    compute = local_batch * 2 * macs.total / device.flops
    slowest_gb_s = min(device.within_node_gb_s, device.between_nodes_gb_s if num_nodes > 1 else math.inf)
    ring = 2 * (num_devices - 1) / num_devices * 4 * cost.trained / (1e9 * slowest_gb_s)
    exposed = ring - min(device.overlap * ring, local_batch * 2 * macs.backward / device.flops)
    waiting = max(0.0, local_batch / (nodes.cpus_per_task * decoded_per_s(size, device)) - compute - exposed)
    validated = (epochs // recipe.eval_every_epochs or 1) * size.val
    computing = steps * compute + validated * 2 * cost.validation.total / (num_devices * device.flops)
    training = computing + steps * (exposed + waiting)
    save_every_s, timeout_s = 60 * (recipe.checkpoints.every_minutes or nodes.timeout_min), 60 * nodes.timeout_min
    saving = training // save_every_s * 8 * cost.weights / (1e9 * device.write_gb_s)
    lost = min(save_every_s, timeout_s) / 2 + device.start_s
    again = restarts(device.start_s + training + saving, timeout_s, lost)
    return {
        "compute": computing,
        "communication": steps * exposed,
        "data": steps * waiting,
        "checkpoints": saving,
        "restarts": device.start_s + (again and again * lost),
    }


def scale_nodes(recipe: Recipe, size: DataSize, profile: Profile | None) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What is assumed, and a row for the chain on each number of nodes of the profile's kind (default: 8 GPUs).

    hours: along the longest path. efficiency: the computing in the device hours. bound: by what takes the most of them.
    """
    nodes = profile or EIGHT_GPUS
    device, per_node, batch_size = device_of(nodes), nodes.tasks_per_node, recipe.batch_size
    save_every_min = recipe.checkpoints.every_minutes or nodes.timeout_min
    if batch_size < per_node:
        raise UserError(f"batch_size: {batch_size} is less than one image for each of the {per_node} devices of a node")
    parents = {key: instance.parents for key, instance in recipe.instances.items()}
    rows: list[dict[str, Any]] = []
    for n in (n for n in NODES if n * per_node <= batch_size):
        seconds = {key: stage_seconds(each, recipe, size, nodes, n) for key, each in recipe.instances.items()}
        hours = {key: sum(parts.values()) / 3600 for key, parts in seconds.items()}
        by_part = {part: sum(parts[part] for parts in seconds.values()) for part in next(iter(seconds.values()))}
        rows.append(
            {
                "num_nodes": n,
                "batch_per_device": batch_size / (n * per_node),
                "hours": longest_path(hours, parents)[1],
                "device_hours": sum(hours.values()) * n * per_node,
                "efficiency": by_part["compute"] / sum(by_part.values()),
                "bound": max(by_part, key=by_part.__getitem__),
            }
        )
    most = f", so that {rows[-1]['num_nodes']} nodes are the most" if rows[-1]["num_nodes"] < NODES[-1] else ""
    decoded = per_node * nodes.cpus_per_task * decoded_per_s(size, device)
    return {
        "data": f"{size.train:,} training and {size.val:,} validation images ({size.source})",
        "batch": f"{batch_size} images on all devices together{most}",
        "device": f"{device.name}, {device.tflops:g} TFLOP/s x {device.efficiency:g} reached, whatever its batch",
        "node": f"{per_node} devices" + (f"; decodes {decoded:,.0f} images/s" if math.isfinite(decoded) else ""),
        "gradients": "4 bytes per trained parameter; one ring, 2 (n - 1) / n x bytes / slowest link; "
        f"{device.overlap:.0%} of its time at most, no longer than the backward pass, is hidden",
        "links": f"{device.within_node_gb_s:g} GB/s in a node, {device.between_nodes_gb_s:g} GB/s between nodes",
        "checkpoints": f"every {save_every_min:,.0f} minutes, {device.write_gb_s:g} GB/s",
        "restarts": f"every {nodes.timeout_min / 60:g} hours; lose half a checkpoint interval and {device.start_s:g} s",
        "jobs": "each on all the nodes of its row; independent ones at the same time; no waiting in the queue",
    }, rows


def scale_table(assumptions: Mapping[str, str], rows: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    head = ("nodes", "batch/device", "time", "device time", "efficiency", "bound by", "")
    few = f"fewer than {FEW_IMAGES_PER_GPU} images per device"
    lines = [
        (f"{n}", f"{batch:g}", duration(hours), duration(device_hours), f"{efficiency:.0%}", bound,
         few if batch < FEW_IMAGES_PER_GPU else "")
        for n, batch, hours, device_hours, efficiency, bound in (row.values() for row in rows)
    ]  # fmt: skip
    return f"assumed, not measured\n{listed(assumptions)}\n\n{table(head, lines, left=(5, 6))}"
