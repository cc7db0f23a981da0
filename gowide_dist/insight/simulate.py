"""A chain on many nodes, simulated: pure arithmetic on stated assumptions. Bytes, seconds and operations throughout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

BACKWARD_PART = 2 / 3  # of the student's operations in a step


class Work(NamedTuple):
    """What one stage instance has to do, wherever it runs. Operations: a multiply and an add are two."""

    images: float  # to train on
    student_flops: float  # for one training image, forward and backward
    teacher_flops: float  # for one training image
    validation_flops: float  # of all validation passes
    gradient_bytes: float  # that every step averages over the processes
    checkpoint_bytes: float
    parents: tuple[str, ...] = ()


class Cluster(NamedTuple):
    """Nodes of equal devices, one process on each device. See `launch.profile.Device` for the fields' meaning."""

    devices_per_node: int
    device_flops: float
    within_node_bytes_s: float
    between_nodes_bytes_s: float  # of a node
    overlap: float
    images_s_per_node: float  # that a node's CPUs decode; infinite where that is no limit
    write_bytes_s: float
    start_s: float
    timeout_s: float
    checkpoint_every_s: float


class Times(NamedTuple):
    """Seconds of a stage, or of a chain."""

    compute: float
    communication: float  # that nothing hides
    data: float  # waiting for images
    checkpoints: float
    restarts: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def all_reduce_s(num_bytes: float, num_processes: int, bandwidth: float) -> float:
    """Of a ring: each process sends and takes 2 (n - 1) / n of the bytes (Patarasu and Yuan 2009)."""
    return 2 * (num_processes - 1) / num_processes * num_bytes / bandwidth


def step_s(work: Work, cluster: Cluster, num_nodes: int, batch_size: int) -> Times:
    """One training step. One ring goes through all devices, so its slowest link counts.

    At most the stated part of the communication hides behind the backward pass. Images are decoded meanwhile.
    """
    num_processes = num_nodes * cluster.devices_per_node
    share = batch_size / num_processes
    compute = share * (work.student_flops + work.teacher_flops) / cluster.device_flops
    backward = share * BACKWARD_PART * work.student_flops / cluster.device_flops
    slowest = cluster.within_node_bytes_s
    if num_nodes > 1:
        slowest = min(slowest, cluster.between_nodes_bytes_s)
    communication = all_reduce_s(work.gradient_bytes, num_processes, slowest)
    exposed = communication - min(cluster.overlap * communication, backward)
    data = batch_size / (num_nodes * cluster.images_s_per_node)
    return Times(compute, exposed, max(0.0, data - compute - exposed), 0.0, 0.0)


def restarts(work_s: float, timeout_s: float, lost_s: float) -> float:
    """How often a job of `work_s` is queued again when each allocation ends after `timeout_s` and each restart loses
    `lost_s`: the smallest r with work + r lost <= (r + 1) timeout. Infinite where a restart loses the whole allocation.
    """
    if work_s <= timeout_s:
        return 0
    if lost_s >= timeout_s:
        return math.inf
    return math.ceil((work_s - timeout_s) / (timeout_s - lost_s))


def stage_times(work: Work, cluster: Cluster, num_nodes: int, batch_size: int) -> Times:
    """A whole stage. A restart loses half a checkpoint interval and the start-up; the first start counts as well."""
    steps = work.images / batch_size
    step = step_s(work, cluster, num_nodes, batch_size)
    num_devices = num_nodes * cluster.devices_per_node
    compute = steps * step.compute + work.validation_flops / (num_devices * cluster.device_flops)
    training = compute + steps * (step.communication + step.data)
    checkpoints = training // cluster.checkpoint_every_s * work.checkpoint_bytes / cluster.write_bytes_s
    lost = min(cluster.checkpoint_every_s, cluster.timeout_s) / 2 + cluster.start_s
    again = restarts(cluster.start_s + training + checkpoints, cluster.timeout_s, lost)
    return Times(
        compute, steps * step.communication, steps * step.data, checkpoints, cluster.start_s + (again and again * lost)
    )


class Simulated(NamedTuple):
    """The chain with every job on `num_nodes` nodes, independent jobs at the same time."""

    num_nodes: int
    batch_per_device: float
    hours: float  # along the longest path
    device_hours: float  # of all jobs together
    efficiency: float  # the computing in these device hours
    bound: str  # what takes the most of the time


def simulate(work: Mapping[str, Work], cluster: Cluster, num_nodes: int, batch_size: int) -> Simulated:
    """Simulate the stages, parents before children."""
    times = {key: stage_times(job, cluster, num_nodes, batch_size) for key, job in work.items()}
    num_devices = num_nodes * cluster.devices_per_node
    total = sum(each.total for each in times.values())
    parts = {name: sum(getattr(each, name) for each in times.values()) for name in Times._fields}
    return Simulated(
        num_nodes,
        batch_size / num_devices,
        longest_path({key: each.total for key, each in times.items()}, {key: job.parents for key, job in work.items()})[
            1
        ]
        / 3600,
        total * num_devices / 3600,
        parts["compute"] / total if total else 1.0,
        max(parts, key=parts.__getitem__),
    )


def longest_path(lengths: Mapping[str, float], parents: Mapping[str, Sequence[str]]) -> tuple[list[str], float]:
    """The path through the graph that takes longest, and its length. Keys: parents before children."""
    best: dict[str, tuple[list[str], float]] = {}
    for key, length in lengths.items():
        before = [best[parent] for parent in parents[key] if parent in best]
        path, so_far = max(before, key=lambda found: found[1], default=([], 0.0))
        best[key] = [*path, key], so_far + length
    return max(best.values(), key=lambda found: found[1], default=([], 0.0))
