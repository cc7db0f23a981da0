"""A few real steps of a stage, in a temporary folder: what they take on this machine.

`python -m gowide_dist.steps FOLDER ...` is what each process of `run_steps` executes. Importing this imports no torch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gowide_dist.data.info import check_split
from gowide_dist.errors import UserError
from gowide_dist.files import write_atomically
from gowide_dist.identity import identities
from gowide_dist.launch.local import leave, num_gpus, torchrun
from gowide_dist.pipeline import open_data, work
from gowide_dist.prepare import check_data, check_group
from gowide_dist.recipe import BlocksStage, Checkpoints, Instance, Recipe, Schedule, load_recipe
from gowide_dist.run import Run, read_metrics
from gowide_dist.stop import WARNING_SIGNAL, Stopped
from gowide_dist.timeline import Batching, Timeline

if TYPE_CHECKING:
    from gowide_dist.data.loader import Loader

NUM_STEPS = 100  # of a stage: several times as many as the loader has batches ready when they begin
LIMIT_S = 60.0  # of a stage, where its steps take longer
_RECORDS = 10  # lines of metrics.jsonl in a phase
_FEWEST_STEPS = 4  # of a phase
_WARM_UP = 0.2  # part of a phase's steps: first calls are slow, and the loader was ahead of them


class StepTimes(NamedTuple):
    """What a few steps of a stage took. step_s, data_wait: means over the warm steps of all phases."""

    num_steps: int
    step_s: float
    data_wait: float  # part of the time
    memory_bytes: int  # peak of the largest process: of its GPU's memory, else of the machine's
    validation_batch_s: float | None  # None if the limit came first
    start_s: float  # once a run: processes started, data opened
    fixed_s: float  # once a stage: networks built, slow first steps, weights written


def run_steps(
    recipe: Recipe, keys: Sequence[str], num_processes: int, num_steps: int = NUM_STEPS, limit_s: float = LIMIT_S
) -> StepTimes:
    """Train instances of one stage together for a few steps, in processes of their own, and read what the loop records.

    All is as in `gowide run`, but for one short epoch, untrained networks (teachers too), a learning rate that moves
    nothing, and images of full size throughout. All files lie in a temporary folder.

    num_steps: of all phases together, at least 4 in each, at most an epoch. limit_s: ends the training sooner.
    Raises UserError as training does, and if there is no step within limit_s.
    """
    from gowide_dist.networks.resnet import build_network
    from gowide_dist.networks.weights import save_weights

    check_group(recipe, num_processes, on_gpus=num_gpus() > 0)
    recipe, _ = check_data(recipe)
    assert recipe.data.classes is not None
    instances = [recipe.instances[key] for key in keys]
    timeline = _timeline(instances[0], recipe, num_steps)
    with tempfile.TemporaryDirectory(prefix="gowide-steps-") as folder:
        run = Run(Path(folder) / "run")
        run.write_recipe(_shortened(recipe, instances[0].stage_name, timeline))
        for teacher in {instance.teacher for instance in instances if instance.teacher}:
            run.stage(teacher).path.mkdir(parents=True)
            network = build_network(recipe.instances[teacher].architecture, recipe.data.classes)
            save_weights(run.stage(teacher).model, network)
        launched = time.monotonic()
        arguments = [str(run.path), str(timeline.total_steps), str(limit_s), *keys]
        torchrun("gowide_dist.steps", arguments, num_processes)
        report = json.loads((run.path / "steps.json").read_text())
        report["start_s"] = time.monotonic() - launched - report["seconds"]
        lines = read_metrics(run.stage(keys[0]).metrics)
    if not lines:
        raise UserError(f"{keys[0]}: no training step within {limit_s:g} s; try a smaller batch_size")
    return _step_times(lines, timeline, report)


def memory_bytes(key: str) -> int:
    """Resident memory of this process. key: VmRSS, as it is now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _timeline(instance: Instance, recipe: Recipe, num_steps: int) -> Timeline:
    """One short epoch of the instance's stage."""
    stage, possible = instance.stage, check_split(recipe.data.train).samples // recipe.batch_size
    num_phases = len(stage.phases(instance.architecture.num_blocks)) if isinstance(stage, BlocksStage) else 1
    steps = min(possible, max(num_steps, _FEWEST_STEPS * num_phases))
    return Timeline(Batching(recipe.batch_size), steps, epochs=1, num_phases=num_phases)


def _shortened(recipe: Recipe, name: str, timeline: Timeline) -> Recipe:
    """The recipe with one epoch of stage `name`."""
    stage = recipe.stages[name]
    assert stage.optim is not None, "a stage that trains has an optim"
    optim = stage.optim.model_copy(update={"lr": 1e-6})
    short = {"epochs": 1, "init": None, "ramp": None, "optim": optim, "schedule": Schedule(decay="constant")}
    return recipe.model_copy(
        update={
            "stages": {**recipe.stages, name: stage.model_copy(update=short)},
            "log_every_steps": max(1, len(timeline.phase(0)) // _RECORDS),
            "checkpoints": Checkpoints(every_minutes=None),
        }
    )


def _step_times(lines: Sequence[Mapping[str, Any]], timeline: Timeline, report: Mapping[str, Any]) -> StepTimes:
    """Means over the warm lines of metrics.jsonl, or all if there is none; each covers the steps since the last."""
    times, warm, end = [], [], 0
    for line in (line for line in lines if line["kind"] == "train"):
        start, end, trained_s = end, line["step"], line["seconds"]
        seconds = (end - start) * timeline.batching.global_batch / line["images_per_s"]
        times.append((end - start, seconds, seconds * line["data_wait"]))
        phase = timeline.phase(timeline.phase_of(start))
        if start >= phase.start + _WARM_UP * len(phase):
            warm.append(times[-1])
    num_steps, seconds, waited_s = map(sum, zip(*(warm or times), strict=True))
    validation_s = lines[-1]["seconds"] - trained_s
    return StepTimes(
        num_steps=end,
        step_s=seconds / num_steps,
        data_wait=waited_s / seconds,
        memory_bytes=report["memory_bytes"],
        validation_batch_s=validation_s / report["validation_batches"] if lines[-1]["kind"] == "val" else None,
        start_s=report["start_s"],
        fixed_s=max(0.0, report["seconds"] - end * seconds / num_steps - validation_s),
    )


def _train(run: Run, keys: Sequence[str], num_steps: int, limit_s: float) -> None:
    """Train, and write `steps.json`; every process of the group calls this."""
    import torch

    from gowide_dist import world as worlds
    from gowide_dist.train.context import TrainContext
    from gowide_dist.train.loop import train_together

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # accuracies of untrained networks would confuse
    recipe, checksums = check_data(load_recipe(run.recipe_path))
    with worlds.join() as world, open_data(recipe, world) as data:
        data.val.steps_per_epoch = min(data.val.steps_per_epoch, num_steps)

        def shortened(seed: int) -> Loader:
            loader = data.train(seed)
            loader.steps_per_epoch = num_steps
            return loader

        ctx = TrainContext(recipe, run, world, replace(data, train=shortened), identities(recipe, checksums))
        began = time.monotonic()
        limit = threading.Timer(limit_s, os.kill, (os.getpid(), WARNING_SIGNAL))  # as Slurm does when time is up
        limit.daemon = True
        limit.start()
        with suppress(Stopped):
            train_together([recipe.instances[key] for key in keys], ctx)
        report = {"seconds": time.monotonic() - began, "validation_batches": data.val.steps_per_epoch}
        peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else memory_bytes("VmHWM")
        report["memory_bytes"] = int(world.gather(torch.tensor([peak], device=world.device)).max())
        if world.is_main:
            write_atomically(run.path / "steps.json", json.dumps(report))


def main() -> int:
    """Entry of each process of `run_steps`; exit status as of `pipeline.main`."""
    folder, num_steps, limit_s, *keys = sys.argv[1:]
    return work(lambda: _train(Run(Path(folder)), keys, int(num_steps), float(limit_s)), Path(folder))


if __name__ == "__main__":
    leave(main())
