"""Stages timed on this machine: a few real steps of each kind, by a run's own processes, loader and loop.

`python -m gowide_dist.insight.timing RUN STAGE/NETWORK ...` is what every process of a measurement executes, in a
temporary folder. Teachers are untrained, each stage stops after some steps, and the loop's `metrics.jsonl` is read.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import numpy as np

from gowide_dist.identity import identities
from gowide_dist.insight.costs import kind, stage_cost
from gowide_dist.launch.local import leave, torchrun
from gowide_dist.launch.profile import Device, this_machine
from gowide_dist.networks.resnet import build_network
from gowide_dist.networks.weights import save_weights
from gowide_dist.pipeline import open_images, work
from gowide_dist.prepare import check_data
from gowide_dist.progress import say
from gowide_dist.recipe import Checkpoints, Instance, Recipe, load_recipe
from gowide_dist.run import Run, read_metrics
from gowide_dist.stop import Stopped
from gowide_dist.train.loop import TrainContext, train_stage
from gowide_dist.world import StopVote, join

ROWS, STEPS = 4, 40  # of a stage; the first row of metrics, in which the machine warms up, does not count
TRAINING_S = 20.0  # fewer steps where these would take longer, but one for each row
_ENDLESS = 10**6  # epochs


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
    recipe.check_processes(num_processes)
    recipe, _ = check_data(recipe)
    keys = {kind(one, recipe): key for key, one in recipe.instances.items() if one.stage.epochs}
    say(f"timing a few steps of {', '.join(keys.values()) or 'nothing'} in {num_processes} processes")
    flops, started, all_steps_s = {}, time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(prefix="gowide-measure-") as folder:
        run = Run(Path(folder) / "run")
        run.write_recipe(recipe)
        torchrun("gowide_dist.insight.timing", [str(run.path), *keys.values()], num_processes)
        total_s = time.monotonic() - started
        for name, key in keys.items():
            rows = read_metrics(run.stage(key).metrics)
            steps = np.diff([0, *(row["step"] for row in rows)])
            seconds = steps * recipe.batch_size / [row["images_per_s"] for row in rows]
            step_s = seconds[1:].sum() / steps[1:].sum()
            waiting = np.average([row["data_wait"] for row in rows[1:]], weights=seconds[1:])
            say(f"{key}: {step_s:.4f} s a step, {waiting:.0%} of it waiting for data")
            flops[name] = float(_step_flops(recipe.instances[key], recipe) / step_s / num_processes)
            all_steps_s += seconds.sum()
    return Measured(flops, total_s - float(all_steps_s))


def time_stages(run: Run, keys: Sequence[str]) -> None:
    """Train each instance for a few steps; every process of the group calls this."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what stopped stages say would confuse
    recipe, checksums = check_data(load_recipe(run.recipe_path))
    quiet = {"eval_every_epochs": _ENDLESS, "checkpoints": Checkpoints(every_minutes=None)}
    with join() as world, open_images(recipe, world) as images:
        for instance in (recipe.instances[key] for key in keys):
            if instance.teacher and world.is_main:
                network = build_network(recipe.instances[instance.teacher].architecture, images.num_classes)
                save_weights(run.stage(instance.teacher).model, network)
            world.broadcast(None)  # the teacher is on disk
            likely_s = _step_flops(instance, recipe) / this_machine(world.num_threads * world.size).flops
            row_steps = max(1, min(STEPS, int(TRAINING_S / likely_s)) // ROWS)
            votes = iter([*repeat(0, ROWS * row_steps - 1), signal.SIGTERM])  # one for each step
            ctx = TrainContext(
                recipe.model_copy(update={**quiet, "log_every_steps": row_steps}),
                run, replace(world, stop_vote=cast(StopVote, votes.__next__)), images, identities(recipe, checksums),
            )  # fmt: skip
            with suppress(Stopped):
                train_stage(_endless(instance), ctx)


def _endless(instance: Instance) -> Instance:
    """The instance from scratch, at full size, with a live teacher, at a rate that spoils no untrained network."""
    stage = instance.stage
    assert stage.optim is not None, "a stage that trains has an optim"
    optim = stage.optim.model_copy(update={"lr": 1e-6})
    changes = {"epochs": _ENDLESS, "optim": optim, "ramp": None, "teacher_logits": "live", "top_k": None}
    changes = {name: value for name, value in changes.items() if name in type(stage).model_fields}
    return instance._replace(stage=stage.model_copy(update=changes), init=None, init_file=None)


def _step_flops(instance: Instance, recipe: Recipe) -> float:
    """Operations of a step in a stage's first phase."""
    assert recipe.data.classes is not None, "a checked recipe"
    return 2 * recipe.batch_size * stage_cost(instance, recipe, recipe.data.classes).phases[0].total


def main() -> int:
    """Entry of every measuring process; exit status as of `pipeline.main`."""
    path, *keys = sys.argv[1:]
    return work(partial(time_stages, Run(Path(path)), keys), Path(path))


if __name__ == "__main__":
    leave(main())
