"""Stages timed on this machine: a few real steps of each kind, by a run's own processes, loader and loop.

`python -m gowide_dist.insight.timing RUN STAGE/NETWORK ...` is what every process of a measurement executes, in a
temporary folder. Teachers are untrained there, and each stage is told to stop after some steps. What is read is the
`metrics.jsonl` that the loop writes.
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
from itertools import count
from pathlib import Path
from typing import Any, cast

from gowide_dist.identity import identities
from gowide_dist.insight.costs import kind, stage_cost
from gowide_dist.launch.local import leave, torchrun
from gowide_dist.launch.profile import Device, this_machine
from gowide_dist.networks.resnet import build_network
from gowide_dist.networks.weights import save_weights
from gowide_dist.pipeline import open_images, work
from gowide_dist.prepare import check_data
from gowide_dist.progress import say
from gowide_dist.recipe import Checkpoints, Instance, KlStage, Recipe, load_recipe
from gowide_dist.run import Run, read_metrics
from gowide_dist.stop import Stopped
from gowide_dist.train.loop import TrainContext, train_stage
from gowide_dist.world import StopVote, join

ROWS, STEPS = 4, 40  # of each stage; the first row of metrics, in which the machine warms up, does not count
TRAINING_S = 20.0  # fewer steps where these would take longer, but one for each row


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
    kinds = {kind(instance, recipe): instance for instance in recipe.instances.values() if instance.stage.epochs}
    flops, started, steps_s = {}, time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(prefix="gowide-measure-") as folder:
        run = Run(Path(folder) / "run")
        run.write_recipe(recipe)
        keys = [instance.key for instance in kinds.values()]
        say(f"timing a few steps of {', '.join(keys) or 'nothing'} in {num_processes} processes")
        torchrun("gowide_dist.insight.timing", [str(run.path), *keys], num_processes)
        total_s = time.monotonic() - started
        for each, instance in kinds.items():
            rows = read_metrics(run.stage(instance.key).metrics)
            starts = [0, *(row["step"] for row in rows)]
            seconds = [
                (row["step"] - start) * recipe.batch_size / row["images_per_s"] for start, row in zip(starts, rows)
            ]
            step_s = sum(seconds[1:]) / (starts[-1] - starts[1])
            waiting = sum(row["data_wait"] * s for row, s in zip(rows[1:], seconds[1:], strict=True)) / sum(seconds[1:])
            say(f"{instance.key}: {step_s:.4f} s a step, {waiting:.0%} of it waiting for data")
            flops[each] = _step_flops(instance, recipe) / num_processes / step_s
            steps_s += sum(seconds)
    return Measured(flops, total_s - steps_s)


def _step_flops(instance: Instance, recipe: Recipe) -> float:
    """Operations of a step in a stage's first phase."""
    assert recipe.data.classes is not None, "a checked recipe"
    return 2 * recipe.batch_size * stage_cost(instance, recipe, recipe.data.classes).phases[0].total


def time_stages(run: Run, keys: Sequence[str]) -> None:
    """Train each instance for a few steps; every process of the group calls this."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what stopped stages say would confuse
    recipe, checksums = check_data(load_recipe(run.recipe_path))
    with join() as world, open_images(recipe, world) as images:
        for instance in (recipe.instances[key] for key in keys):
            likely_s = _step_flops(instance, recipe) / this_machine(world.num_threads * world.size).flops
            row_steps = max(1, min(STEPS, int(TRAINING_S / likely_s)) // ROWS)
            quiet = {
                "log_every_steps": row_steps,
                "eval_every_epochs": _ENDLESS,
                "checkpoints": Checkpoints(every_minutes=None),
            }
            calls = count(1)
            vote = cast(StopVote, lambda: signal.SIGTERM if next(calls) == ROWS * row_steps else 0)
            ctx = TrainContext(
                recipe.model_copy(update=quiet),
                run,
                replace(world, stop_vote=vote),
                images,
                identities(recipe, checksums),
            )
            if world.is_main and instance.teacher:
                save_weights(
                    run.stage(instance.teacher).model,
                    build_network(recipe.instances[instance.teacher].architecture, images.num_classes),
                )
            world.broadcast(None)  # the teacher is on disk
            with suppress(Stopped):
                train_stage(_endless(instance), ctx)


def _endless(instance: Instance) -> Instance:
    """From scratch, at full size, with a live teacher, at a rate that spoils no untrained network."""
    stage = instance.stage
    assert stage.optim is not None, "a stage that trains has an optim"
    changes = {"epochs": _ENDLESS, "optim": stage.optim.model_copy(update={"lr": 1e-6}), "ramp": None}
    if isinstance(stage, KlStage):
        changes |= {"teacher_logits": "live", "top_k": None}
    return instance._replace(stage=stage.model_copy(update=changes), init=None, init_file=None)


_ENDLESS = 10**6  # epochs


def main() -> int:
    """Entry of every measuring process; exit status as of `pipeline.main`."""
    path, *keys = sys.argv[1:]
    return work(partial(time_stages, Run(Path(path)), keys), Path(path))


if __name__ == "__main__":
    leave(main())
