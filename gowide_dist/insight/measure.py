"""Stages timed on this machine: a few real steps of each kind, with the real loader, networks, loop and processes.

`python -m gowide_dist.insight.measure FOLDER LAUNCHED` is what every process of a measurement executes. Teachers are
untrained, of the right shape; all files lie in a temporary folder.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from gowide_dist.data.info import check_split
from gowide_dist.files import write_atomically
from gowide_dist.identity import fingerprint, identities
from gowide_dist.insight.costs import phases, training_macs, with_teacher, without_teacher
from gowide_dist.launch.local import leave, torchrun
from gowide_dist.launch.profile import this_machine
from gowide_dist.pipeline import open_images, work
from gowide_dist.prepare import check_data
from gowide_dist.progress import say
from gowide_dist.recipe import BlocksStage, Checkpoints, Instance, KlStage, Recipe, load_recipe
from gowide_dist.run import Run, read_metrics

if TYPE_CHECKING:
    from gowide_dist.data.loader import Batch, Loader
    from gowide_dist.train.loop import Images, TrainContext
    from gowide_dist.world import World

STEPS = 40  # of a phase
ROWS = 4  # logged averages of a phase; the first, in which the machine warms up, does not count
TRAINING_S = 20.0  # fewer steps where these would take longer, but no fewer than a row each
VALIDATION_BATCHES = 40


class Timing(BaseModel):
    """What a kind of stage takes here, in seconds.

    step: one of training, averaged over the phases. validation: one batch. fixed: all else, once a stage: networks
    built, the first steps' delay, weights written. save: one checkpoint.
    """

    step: float
    validation: float
    fixed: float
    save: float


class Measured(BaseModel):
    """The timings by kind of stage; the seconds from the command to the first stage; a process's greatest memory."""

    kinds: dict[str, Timing]
    start_seconds: float
    memory_bytes: int

    def timing(self, instance: Instance, recipe: Recipe) -> Timing:
        """That of the instance's kind."""
        return self.kinds[kind(instance, recipe)]


def kind(instance: Instance, recipe: Recipe) -> str:
    """Equal for instances whose steps take the same time."""
    plain: dict[str, Any] = {"mode": "json", "exclude_defaults": True}
    stage = instance.stage.model_dump(
        **plain, exclude={"train", "init", "teacher", "seed", "epochs", "schedule", "ramp", "optim"}
    )
    optim = instance.stage.optim
    teacher = instance.teacher and recipe.instances[instance.teacher].architecture.model_dump(**plain)
    return fingerprint(
        {
            "stage": stage,
            "optim": optim and optim.model_dump(**plain, include={"momentum", "nesterov", "clip_norm", "accumulate"}),
            "average": bool(optim and optim.ema),
            "network": instance.architecture.model_dump(**plain),
            "teacher": teacher,
        }
    )


def variants(instance: Instance) -> list[Instance]:
    """What is timed of a stage: with stored answers, the student that asks for them, and those that find them."""
    if isinstance(instance.stage, KlStage) and instance.stage.teacher_logits == "stored":
        return [with_teacher(instance), without_teacher(instance)]
    return [instance]


def measure(recipe: Recipe, instances: Sequence[Instance], num_processes: int) -> Measured:
    """Time each kind among the instances. Raises UserError if the data does not fit or a network cannot be trained."""
    recipe.check_processes(num_processes)
    check_data(recipe)
    kinds = {kind(instance, recipe): instance for instance in instances if instance.stage.epochs}
    with tempfile.TemporaryDirectory(prefix="gowide-measure-") as folder:
        run = Run(Path(folder) / "run")
        run.write_recipe(recipe)
        keys = [instance.key for instance in kinds.values()]
        say(f"timing a few steps of {', '.join(keys) or 'nothing'} in {num_processes} processes")
        arguments = [str(run.path), str(time.time()), *keys]
        torchrun("gowide_dist.insight.measure", arguments, num_processes)
        return Measured.model_validate_json((run.path / "measured.json").read_bytes())


def time_kinds(run: Run, launched: float, keys: Sequence[str]) -> None:
    """Time the named instances and write `measured.json`; every process of the group calls this."""
    from gowide_dist import world as worlds

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # accuracies of untrained networks would confuse
    recipe, checksums = check_data(load_recipe(run.recipe_path))
    timings = {}
    with worlds.join() as world, open_images(recipe, world) as images:
        start_seconds = time.time() - launched
        for instance in (variant for key in keys for variant in variants(recipe.instances[key])):
            if timing := _time(instance, recipe, run, world, images, identities(recipe, checksums)):
                timings[kind(instance, recipe)] = timing
                say(f"{instance.key}: {timing.step:.4f} s a step, {timing.validation:.4f} s a validation batch")
        if world.is_main:
            measured = Measured(kinds=timings, start_seconds=start_seconds, memory_bytes=_memory_bytes(world))
            write_atomically(run.path / "measured.json", measured.model_dump_json())


def _time(
    instance: Instance, recipe: Recipe, run: Run, world: World, images: Images, identities: Mapping[str, Any]
) -> Timing | None:
    """Train a shortened stage by the one loop there is, and take its time apart, on the main process."""
    from gowide_dist.train.loop import TrainContext, train_stage
    from gowide_dist.train.optim import Timeline

    num_phases = len(phases(instance.stage, instance.architecture)) if isinstance(instance.stage, BlocksStage) else 1
    row_steps = _steps_of_row(instance, recipe, images.num_classes, world.num_threads * world.size)
    wanted = ROWS * row_steps * num_phases
    samples = check_split(recipe.data.train).samples
    steps_per_epoch = min(wanted // 2, samples // recipe.batch_size)
    epochs = math.ceil(wanted / steps_per_epoch)
    validation = _Validation(images.val)

    def train(seed: int) -> Loader:
        loader = images.train(seed)
        loader.steps_per_epoch = steps_per_epoch
        return loader

    updates = {
        "log_every_steps": row_steps,
        "eval_every_epochs": epochs // 2,  # so that there is a second pass, which is a warm one
        "checkpoints": Checkpoints(every_minutes=None),
    }
    shortened = replace(images, train=train, val=cast("Loader", validation))
    ctx = TrainContext(recipe.model_copy(update=updates), run, world, shortened, identities)
    if instance.teacher:
        _leave_untrained(recipe.instances[instance.teacher], ctx)
    done = train_stage(_shortened(instance, epochs), ctx)
    if not world.is_main:
        return None
    rows = read_metrics(run.stage(instance.key).metrics)
    timeline = Timeline(steps_per_epoch, epochs, num_phases)
    step, delay, trained = _apart(rows, recipe.batch_size, [timeline.phase(index) for index in range(num_phases)])
    return Timing(
        step=step,
        validation=validation.last_seconds / validation.num_batches,
        fixed=max(0.0, done.seconds - trained - validation.seconds + delay),
        save=_time_saving(instance, images.num_classes, run.path),
    )


def _apart(rows: Sequence[Mapping[str, Any]], batch_size: int, steps: Sequence[range]) -> tuple[float, float, float]:
    """Seconds of a warm step, averaged over the phases; how much longer their first steps took; of all steps.

    rows: of metrics.jsonl. Those at the beginning of a phase, or after a validation pass, do not count as warm.
    """
    warm: dict[int, list[tuple[int, float]]] = {index: [] for index in range(len(steps))}
    cold: dict[int, tuple[int, float]] = {}
    total, end, follows_validation = 0.0, 0, False
    for row in rows:
        if row["kind"] == "val":
            follows_validation = True
            continue
        start, end = end, row["step"]
        phase = next(index for index, span in enumerate(steps) if start in span)
        part = (end - start, (end - start) * batch_size / row["images_per_s"])
        total += part[1]
        if start == steps[phase].start:
            cold[phase] = part
        elif not follows_validation:
            warm[phase].append(part)
        follows_validation = False
    of_phase = {
        index: sum(seconds for _, seconds in parts) / sum(count for count, _ in parts) for index, parts in warm.items()
    }
    delay = sum(seconds - count * of_phase[phase] for phase, (count, seconds) in cold.items())
    return fmean(of_phase.values()), delay, total


class _Validation:
    """The first batches of a validation pass, timed with what is done with them."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.num_batches = min(VALIDATION_BATCHES, loader.steps_per_epoch)
        self.seconds = self.last_seconds = 0.0

    def batches(self) -> Iterator[Batch]:
        """The batches of a pass."""
        start = time.perf_counter()
        yield from islice(self._loader.batches(), self.num_batches)
        self.last_seconds = time.perf_counter() - start
        self.seconds += self.last_seconds


def _steps_of_row(instance: Instance, recipe: Recipe, num_classes: int, num_cores: int) -> int:
    """As many as are measured of a small network, fewer of one whose steps are likely to take long."""
    flops = 2 * training_macs(instance, recipe, num_classes).total * recipe.batch_size
    likely_s = flops / this_machine(num_cores).flops
    return max(1, min(STEPS // ROWS, int(TRAINING_S / ROWS / likely_s)))


def _shortened(instance: Instance, epochs: int) -> Instance:
    """From scratch, at a rate that spoils no untrained network."""
    stage = instance.stage
    assert stage.optim is not None, "a stage that trains has an optim"
    optim = stage.optim.model_copy(update={"lr": 1e-6})
    short = stage.model_copy(update={"epochs": epochs, "optim": optim, "ramp": None})
    return instance._replace(stage=short, init=None, init_file=None)


def _leave_untrained(teacher: Instance, ctx: TrainContext) -> None:
    """Weights where those of a finished teacher are read from, unless it was timed itself and has left some."""
    from gowide_dist.networks.resnet import build_network
    from gowide_dist.networks.weights import save_weights

    path = ctx.run.stage(teacher.key).model
    if ctx.world.is_main and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(path, build_network(teacher.architecture, ctx.images.num_classes))
    ctx.world.broadcast(None)  # none goes on before they are there


def _time_saving(instance: Instance, num_classes: int, folder: Path) -> float:
    """Seconds to write a state as large as a checkpoint: the weights and their momentum."""
    from gowide_dist.networks.resnet import build_network
    from gowide_dist.train.checkpoint import save_checkpoint

    weights, momentum = (build_network(instance.architecture, num_classes).state_dict() for _ in range(2))
    start = time.perf_counter()
    save_checkpoint(folder, {"weights": weights, "momentum": momentum}, step=1, metadata={}, keep=1)
    return time.perf_counter() - start


def _memory_bytes(world: World) -> int:
    """The most that this process has taken: of its GPU's memory, else of the machine's."""
    import torch

    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of every measuring process; exit status as of `pipeline.main`."""
    folder, launched, *keys = sys.argv[1:] if arguments is None else arguments
    return work(partial(time_kinds, Run(Path(folder)), float(launched), keys), Path(folder))


if __name__ == "__main__":
    leave(main())
