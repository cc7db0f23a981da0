"""Stages timed on this machine: a few real steps of each kind of stage, for `gowide plan --measure`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gowide_dist.insight.costs import kind, stage_cost
from gowide_dist.launch.profile import Device
from gowide_dist.prepare import check_data
from gowide_dist.progress import say
from gowide_dist.recipe import Instance, Recipe
from gowide_dist.steps import run_steps


@dataclass(frozen=True)
class Measured:
    """Operations a second of a process, by kind of stage, and the seconds that a run takes beside its steps."""

    flops: dict[Any, float]
    start_seconds: float

    def device(self, instance: Instance, recipe: Recipe, device: Device) -> Device:
        """`device` at the speed of the instance's kind, which includes loading data."""
        tflops = self.flops.get(kind(instance, recipe), device.flops) / 1e12
        return device.model_copy(update={"tflops": tflops, "efficiency": 1.0, "images_per_s_per_cpu": math.inf})


def measure(recipe: Recipe, num_processes: int) -> Measured:
    """Time each kind of stage. Raises UserError if the data does not fit or a network cannot be trained."""
    recipe, _ = check_data(recipe)
    assert recipe.data.classes is not None, "a checked recipe"
    kinds = {kind(instance, recipe): instance for instance in recipe.instances.values() if instance.stage.epochs}
    flops: dict[Any, float] = {}
    start_s = fixed_s = 0.0
    for stage_kind, instance in kinds.items():
        times = run_steps(recipe, [instance.key], num_processes)
        say(f"{instance.key}: {times.step_s:.4f} s a step, {times.data_wait:.0%} of it waiting for data")
        macs = stage_cost(instance, recipe, recipe.data.classes).macs.total
        flops[stage_kind] = 2 * recipe.batch_size * macs / num_processes / times.step_s
        start_s, fixed_s = max(start_s, times.start_s), fixed_s + times.fixed_s
    return Measured(flops, start_s + fixed_s)
