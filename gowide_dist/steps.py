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
from statistics import fmean
from typing import Any, NamedTuple

from gowide_dist.data.info import check_split
from gowide_dist.errors import UserError
from gowide_dist.files import write_atomically
from gowide_dist.identity import identities
from gowide_dist.instances import Instance
from gowide_dist.launch.local import leave, num_gpus, torchrun
from gowide_dist.networks.foreign import Own
from gowide_dist.pipeline import open_data, work
from gowide_dist.prepare import check_data, check_foreign, check_group
from gowide_dist.recipe import Checkpoints, Recipe
from gowide_dist.run import Run, read_metrics
from gowide_dist.stages import Schedule
from gowide_dist.stop import WARNING_SIGNAL, Stopped

# Of a stage, at most an epoch. The first half of each phase is left out: first calls are slow, and the loader has
# batches ready.
NUM_STEPS = 100
LIMIT_S = 60.0  # of a stage, where its steps take longer


class StepTimes(NamedTuple):
    """What a few steps of a stage took. step_s, data_wait: means over the warm steps of all phases."""

    num_steps: int
    step_s: float
    data_wait: float  # part of the time
    memory_bytes: int  # peak of the largest process: of its GPU's memory, else of the machine's
    start_s: float  # once a run: processes started, data opened
    fixed_s: float  # once a stage: networks built, slow first steps, weights written


def run_steps(recipe: Recipe, keys: Sequence[str], num_processes: int) -> StepTimes:
    """Train instances of one stage together for a few steps, in processes of their own, and read what the loop records.

    All is as in `gowide run`, but for one short epoch, untrained networks (teachers too), a learning rate that moves
    nothing, one validation batch, and images of full size throughout. All files lie in a temporary folder.

    Raises UserError as training does, and if there is no step within LIMIT_S.
    """
    check_group(recipe, num_processes, on_gpus=num_gpus() > 0)
    recipe, _ = check_data(recipe)
    check_foreign(recipe, [recipe.instances[key] for key in keys])
    num_steps, short = _shortened(recipe, recipe.instances[keys[0]])
    with tempfile.TemporaryDirectory(prefix="gowide-steps-") as folder:
        run = Run(Path(folder) / "run")
        run.write_recipe(short)
        launched = time.monotonic()
        torchrun("gowide_dist.steps", [str(run.path), str(num_steps), str(LIMIT_S), *keys], num_processes)
        report = json.loads((run.path / "steps.json").read_text())
        start_s = time.monotonic() - launched - report["seconds"]
        lines = [line for line in read_metrics(run.stage(keys[0]).metrics) if line["kind"] == "train"]
    if not lines:
        raise UserError(f"{keys[0]}: no training step within {LIMIT_S:g} s; try a smaller batch_size")
    step_s, data_wait = _warm_means(lines, short)
    num_steps = lines[-1]["step"]
    fixed_s = max(0.0, report["seconds"] - num_steps * step_s)
    return StepTimes(num_steps, step_s, data_wait, report["memory_bytes"], start_s, fixed_s)


def memory_bytes(key: str) -> int:
    """Resident memory of this process. key: VmRSS, as it is now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _num_blocks(recipe: Recipe, instance: Instance) -> int:
    """Of the instance's network; one of the user's own that is walked block by block is asked."""
    settings, classes = instance.architecture, recipe.data.classes
    if not isinstance(settings, Own) or instance.stage.objective != "blocks":
        return settings.num_blocks
    from gowide_dist.networks.build import build_on_meta

    assert classes is not None, "checked data fills it in"
    return build_on_meta(settings, classes).num_blocks


def _shortened(recipe: Recipe, instance: Instance) -> tuple[int, Recipe]:
    """The steps of one short epoch, equally many in each phase, and the recipe that records each phase's halves."""
    stage, possible = instance.stage, check_split(recipe.data.train).samples // recipe.batch_size
    assert stage.optim is not None, "a stage that trains has an optim"
    num_phases = stage.num_phases(_num_blocks(recipe, instance))
    every = max(1, min(NUM_STEPS, possible) // (2 * num_phases))
    optim = stage.optim.model_copy(update={"lr": 1e-6})
    short = {"epochs": 1, "init": None, "ramp": None, "optim": optim, "schedule": Schedule(decay="constant")}
    stages = {**recipe.stages, instance.stage_name: stage.model_copy(update=short)}
    changes = {"stages": stages, "log_every_steps": every, "checkpoints": Checkpoints(every_minutes=None)}
    return min(possible, num_phases * 2 * every), recipe.model_copy(update=changes)


def _warm_means(lines: Sequence[Mapping[str, Any]], short: Recipe) -> tuple[float, float]:
    """Seconds of a step and the part spent waiting for data, over the second half of each phase, if there is one."""
    warm = [line for line in lines if line["step"] % (2 * short.log_every_steps) == 0] or lines[-1:]
    seconds = [short.batch_size / line["images_per_s"] for line in warm]
    return fmean(seconds), fmean((line["data_wait"] for line in warm), seconds)


def _train(run: Run, keys: Sequence[str], num_steps: int, limit_s: float) -> None:
    """Train, and write `steps.json`; every process of the group calls this."""
    import torch

    from gowide_dist import world as worlds
    from gowide_dist.networks.build import build_network
    from gowide_dist.networks.weights import save_weights
    from gowide_dist.train.context import TrainContext
    from gowide_dist.train.loop import train_together

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # accuracies of untrained networks would confuse
    recipe, checksums = check_data(run.recipe())
    instances = [recipe.instances[key] for key in keys]
    with worlds.join() as world, open_data(recipe, world) as data:

        def write_teacher(key: str) -> None:
            run.stage(key).path.mkdir(parents=True)
            save_weights(run.stage(key).model, build_network(recipe.instances[key].architecture, data.num_classes))

        def train(seed: int) -> Any:
            loader = data.train(seed)
            loader.steps_per_epoch = num_steps
            return loader

        data.val.steps_per_epoch = 1
        if teacher := instances[0].teacher:
            world.on_main(lambda: write_teacher(teacher))
        ctx = TrainContext(recipe, run, world, replace(data, train=train), identities(recipe, checksums))
        began = time.monotonic()
        threading.Timer(limit_s, os.kill, (os.getpid(), WARNING_SIGNAL)).start()  # as Slurm does when time is up
        with suppress(Stopped):
            train_together(instances, ctx)
        seconds = time.monotonic() - began
        peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else memory_bytes("VmHWM")
        peak = int(world.gather(torch.tensor([peak], device=world.device)).max())
        if world.is_main:
            write_atomically(run.path / "steps.json", json.dumps({"seconds": seconds, "memory_bytes": peak}))


def main() -> int:
    """Entry of each process of `run_steps`; exit status as of `pipeline.main`."""
    folder, num_steps, limit_s, *keys = sys.argv[1:]
    return work(lambda: _train(Run(Path(folder)), keys, int(num_steps), float(limit_s)), Path(folder))


if __name__ == "__main__":
    leave(main())
