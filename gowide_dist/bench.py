"""Does this machine feed and train a recipe: its loader against the usual ones, and real steps of every stage.

`python -m gowide_dist.bench FOLDER ...` is what each process of `run_steps` executes. Importing this imports no torch.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from pydantic import BaseModel

from gowide_dist.data.info import check_split, read_dataset_info
from gowide_dist.errors import DataError, UserError
from gowide_dist.files import write_atomically
from gowide_dist.identity import identities
from gowide_dist.launch.local import leave, num_gpus, torchrun
from gowide_dist.pipeline import open_images, work
from gowide_dist.prepare import check_data, check_group
from gowide_dist.recipe import BlocksStage, Checkpoints, Instance, Recipe, Schedule, load_recipe
from gowide_dist.run import Run, read_metrics
from gowide_dist.stop import Stopped
from gowide_dist.timeline import Batching, Timeline

NUM_STEPS = 100  # of a stage: at least as many again as the loader has ready when they begin
LIMIT_S = 60.0  # of a stage, where its steps take longer
_ROUNDS = 3  # of the loaders
_RECORDS = 10  # lines of metrics.jsonl in a phase
_WARM_UP = 0.2  # part of a phase's steps: first calls are slow, and find the batches that the loader had ready

Epoch: TypeAlias = Callable[[int], int]  # runs an epoch, returns its number of images


class StepTimes(BaseModel):
    """What the steps of a stage took: warm ones, averaged over the phases, each of which is equally long."""

    num_steps: int
    step_s: float
    images_per_s: float  # of all processes
    data_wait: float  # part of the time
    comm_wait: float
    memory_bytes: int  # greatest of a process: of its GPU's memory, else of the machine's
    validation_batch_s: float | None  # None where the time was up before validation
    start_s: float  # from the launch until the data is open
    fixed_s: float  # all else, once a stage: networks built, slow first steps, weights written


def machine() -> dict[str, Any]:
    """What the measurements are made on."""
    import torch

    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": int(os.environ.get("OMP_NUM_THREADS", cores)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "load_average": round(os.getloadavg()[0], 1),  # above the number of cores, seconds are noise
    }


def cpu_name() -> str:
    """The processor's name, or where Linux does not know it the architecture's."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.machine()


def stages(recipe: Recipe, num_processes: int, **limits: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What training each stage of the recipe took, its networks together, as JSON; `limits` as of `run_steps`."""
    for name, group in itertools.groupby(recipe.instances.values(), lambda instance: instance.stage_name):
        if recipe.stages[name].epochs:
            times = run_steps(recipe, [instance.key for instance in group], num_processes, **limits)
            yield (
                name,
                {
                    "images_per_s": round(times.images_per_s, 1),
                    "data_wait": round(times.data_wait, 3),
                    "comm_wait": round(times.comm_wait, 3),
                    "memory_mib": round(times.memory_bytes / 2**20),
                    "steps": times.num_steps,
                    "processes": num_processes,
                },
            )


class Contender(NamedTuple):
    """A way of reading the same images. prepare: a function of the others, which returns the epoch to run."""

    prepare: Callable[[Path, int, int, bool, int], Epoch]
    path: Path
    batch_size: int
    side: int
    cropped: bool
    num_threads: int


def loader(
    data_dir: Path,
    images_dir: Path | None = None,
    *,
    batch_size: int = 128,
    resolution: int | None = None,
    num_threads: int | None = None,
) -> dict[str, Any]:
    """Rates and memory of this loader, stock FFCV, torchvision and mere decoding, with their ratios.

    data_dir: a dataset that `gowide encode` wrote; images_dir: the same images for torchvision's ImageFolder (class
    folders, or a folder `train` of them). Variable or large images are cropped at random to `resolution` (default 224)
    and flipped, small fixed ones shifted and flipped. num_threads: by default one a core.

    Returns `over_ffcv`, `over_torchvision` (with images_dir), `of_decode_only` (where there are JPEGs) and
    `memory_over_ffcv`: medians of the ratios of the rounds; and what they come from, `images_per_s` and `memory_mib`
    (how far each grew at most, after its imports). Raises DataError where a folder is not there.
    """
    beton = data_dir / "train.beton"
    info = read_dataset_info(beton)
    cropped = resolution is not None or info.fixed_side_px is None
    side = resolution or info.fixed_side_px or 224
    settings = batch_size, side, cropped, num_threads or len(os.sched_getaffinity(0))
    contenders = {"gowide_dist": Contender(_own, beton, *settings), "ffcv": Contender(_ffcv, beton, *settings)}
    if info.encoding.get("jpg_share"):
        contenders["decode_only"] = Contender(_decode_only, beton, *settings)
    if images_dir is not None:
        folder = images_dir / "train" if (images_dir / "train").is_dir() else images_dir
        if not folder.is_dir():
            raise DataError(f"{folder}: not found; give the folder of class folders as --images")
        contenders["torchvision"] = Contender(_torchvision, folder, *settings)
    rates, memory = _race(contenders)

    def ratio(other: str) -> float:
        pairs = zip(rates["gowide_dist"], rates[other], strict=True)
        return round(statistics.median(own / others for own, others in pairs), 3)

    names = {"ffcv": "over_ffcv", "torchvision": "over_torchvision", "decode_only": "of_decode_only"}
    return {
        **{key: ratio(name) for name, key in names.items() if name in contenders},
        "memory_over_ffcv": round(memory["gowide_dist"] / memory["ffcv"], 3),
        "images_per_s": {name: round(statistics.median(values)) for name, values in rates.items()},
        "memory_mib": {name: round(value / 2**20) for name, value in memory.items()},
    }


def _race(contenders: Mapping[str, Contender]) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Images per second in every round, and growth in bytes; in turns, each in a process that no other warms up."""
    context = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, int] = {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in contenders}
        for epoch in range(_ROUNDS + 1):
            for name, contender in contenders.items():
                rate, memory[name] = processes[name].submit(_run_epoch, contender, epoch).result()
                if epoch:  # the first compiles, and warms the system's file cache
                    rates[name].append(rate)
    return rates, memory


def _run_epoch(contender: Contender, epoch: int) -> tuple[float, int]:
    """Images per second of an epoch in this process, and how far its memory has grown at most."""
    before, run = _prepared(contender)
    start = time.perf_counter()
    num_images = run(epoch)
    return num_images / (time.perf_counter() - start), _memory_bytes("VmHWM") - before


@functools.cache
def _prepared(contender: Contender) -> tuple[int, Epoch]:
    """Memory after the imports, which must not count as growth, and the epoch to run."""
    for module in ("cv2", "torch", *(["ffcv.loader"] if contender.prepare is _ffcv else [])):
        importlib.import_module(module)
    return _memory_bytes("VmRSS"), contender.prepare(*contender[1:])


def _own(beton: Path, batch_size: int, side: int, cropped: bool, num_threads: int) -> Epoch:
    from gowide_dist.data.decode import RandomCrop, Shift
    from gowide_dist.data.loader import Loader

    geometry = RandomCrop(True, 0.08, 1.0, 3 / 4, 4 / 3) if cropped else Shift(True, 4)
    batching = Batching(batch_size)
    stream = Loader(beton, batching, train=True, geometry=geometry, resolution=side, num_threads=num_threads)
    return lambda epoch: sum(len(batch.images) for batch in stream.batches(epoch))


def _ffcv(beton: Path, batch_size: int, side: int, cropped: bool, num_threads: int) -> Epoch:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate, ToTensor

    if cropped:
        pipeline = [RandomResizedCropRGBImageDecoder((side, side)), RandomHorizontalFlip(), ToTensor()]
    else:
        pipeline = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(4), ToTensor()]
    settings = {"num_workers": num_threads, "order": OrderOption.RANDOM, "seed": 0, "pipelines": {"image": pipeline}}
    stream = Loader(str(beton), batch_size=batch_size, **settings)
    return lambda _: sum(len(images) for images, _ in stream)


def _decode_only(beton: Path, batch_size: int, side: int, cropped: bool, num_threads: int) -> Epoch:
    """Every image decoded whole by the same JPEG library, and nothing else."""
    import numpy as np

    from gowide_dist.data import decode
    from gowide_dist.data.beton import JPEG, Beton
    from gowide_dist.data.threads import DaemonThreads

    source = decode.source_of(Beton(beton))
    parts = np.array_split(np.flatnonzero(source.modes == JPEG), num_threads)
    scratches = [decode.Scratch.of(source) for _ in parts]
    pool = DaemonThreads(num_threads)

    def epoch(_: int) -> int:
        tasks = [functools.partial(decode.decode_whole, source, *work) for work in zip(parts, scratches, strict=True)]
        for future in [pool.submit(task) for task in tasks]:
            future.result()
        return sum(map(len, parts))

    return epoch


def _torchvision(folder: Path, batch_size: int, side: int, cropped: bool, num_threads: int) -> Epoch:
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    geometry = v2.RandomResizedCrop(side) if cropped else v2.RandomCrop(side, padding=4)
    dataset = ImageFolder(folder, v2.Compose([geometry, v2.RandomHorizontalFlip(), v2.PILToTensor()]))
    stream = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, num_workers=num_threads, drop_last=True, persistent_workers=True
    )
    return lambda _: sum(len(images) for images, _ in stream)


def run_steps(
    recipe: Recipe, keys: Sequence[str], num_processes: int, *, num_steps: int = NUM_STEPS, limit_s: float = LIMIT_S
) -> StepTimes:
    """Train instances of one stage together for a few steps, in processes of their own, and read what the loop records.

    Everything is as in `gowide run`, but for shorter epochs, networks without training (teachers too), a learning rate
    that moves nothing, and images of full size throughout. All files lie in a temporary folder.

    num_steps: of all phases together, at least 4 in each. limit_s: fewer steps where these would take longer.
    Raises UserError as training does, and if there was no step within limit_s.
    """
    check_group(recipe, num_processes, on_gpus=num_gpus() > 0)
    recipe, _ = check_data(recipe)
    instances = [recipe.instances[key] for key in keys]
    short, timeline = _shorten(recipe, instances[0], num_steps)
    with tempfile.TemporaryDirectory(prefix="gowide-bench-") as folder:
        run = Run(Path(folder) / "run")
        run.write_recipe(short)
        for teacher in {instance.teacher for instance in instances if instance.teacher}:
            _write_untrained(recipe.instances[teacher], recipe, run)
        arguments = [str(run.path), str(timeline.steps_per_epoch), str(limit_s), str(time.time()), *keys]
        torchrun("gowide_dist.bench", arguments, num_processes)
        report = json.loads((run.path / "steps.json").read_text())
        lines = read_metrics(run.stage(keys[0]).metrics)
    if not lines:
        raise UserError(f"{keys[0]}: no training step within {limit_s:g} s; try a smaller batch_size")
    return _step_times(lines, timeline, report)


def _shorten(recipe: Recipe, instance: Instance, num_steps: int) -> tuple[Recipe, Timeline]:
    """The recipe with the instance's stage shortened to about `num_steps` steps."""
    stage, possible = instance.stage, check_split(recipe.data.train).samples // recipe.batch_size
    assert stage.optim is not None, "a stage that trains has an optim"
    num_phases = len(stage.phases(instance.architecture.num_blocks)) if isinstance(stage, BlocksStage) else 1
    wanted = num_phases * max(4, num_steps // num_phases)
    epochs = math.ceil(wanted / possible)
    optim = stage.optim.model_copy(update={"lr": 1e-6})
    updates = {"epochs": epochs, "init": None, "ramp": None, "optim": optim, "schedule": Schedule(decay="constant")}
    shortened = {
        "stages": {**recipe.stages, instance.stage_name: stage.model_copy(update=updates)},
        "log_every_steps": max(1, wanted // num_phases // _RECORDS),
        "eval_every_epochs": epochs,
        "checkpoints": Checkpoints(every_minutes=None),
    }
    # validated anew, for a copy would keep the graph of instances
    short = Recipe.model_validate(recipe.model_copy(update=shortened).model_dump(mode="json"))
    return short, Timeline(Batching(recipe.batch_size), math.ceil(wanted / epochs), epochs, num_phases)


def _write_untrained(teacher: Instance, recipe: Recipe, run: Run) -> None:
    """New weights where those of a finished teacher are read from."""
    from gowide_dist.networks.resnet import build_network
    from gowide_dist.networks.weights import save_weights

    path = run.stage(teacher.key).model
    path.parent.mkdir(parents=True)
    assert recipe.data.classes is not None, "the recipe is checked against its data"
    save_weights(path, build_network(teacher.architecture, recipe.data.classes))


def _step_times(lines: Sequence[Mapping[str, Any]], timeline: Timeline, report: Mapping[str, Any]) -> StepTimes:
    """The averages over the warm lines of metrics.jsonl, as each covers the steps since the line before."""
    records = [line for line in lines if line["kind"] == "train"]
    validation = [line["seconds"] - records[-1]["seconds"] for line in lines if line["kind"] == "val"]
    batch_size = timeline.batching.global_batch
    starts = [0, *(line["step"] for line in records)]
    steps = [line["step"] - start for start, line in zip(starts, records, strict=False)]
    seconds = [count * batch_size / line["images_per_s"] for count, line in zip(steps, records, strict=True)]
    step_s, warm = [], []
    for phase, group in itertools.groupby(range(len(records)), lambda index: timeline.phase_of(starts[index])):
        indices = list(group)
        first = timeline.phase(phase).start
        warm_from = first + _WARM_UP * (records[indices[-1]]["step"] - first)
        kept = [index for index in indices if starts[index] >= warm_from] or indices
        step_s.append(sum(seconds[index] for index in kept) / sum(steps[index] for index in kept))
        warm += kept

    def part(key: str) -> float:
        return sum(records[index][key] * seconds[index] for index in warm) / sum(seconds[index] for index in warm)

    mean_s = statistics.fmean(step_s)
    return StepTimes(
        num_steps=starts[-1],
        step_s=mean_s,
        images_per_s=batch_size / mean_s,
        data_wait=part("data_wait"),
        comm_wait=part("comm_wait"),
        memory_bytes=report["memory_bytes"],
        validation_batch_s=validation[-1] / report["validation_batches"] if validation else None,
        start_s=report["start_s"],
        fixed_s=max(0.0, report["seconds"] - starts[-1] * mean_s - sum(validation)),
    )


def _train_steps(run: Run, keys: Sequence[str], steps_per_epoch: int, limit_s: float, launched: float) -> None:
    """Train, and write `steps.json`; every process of the group calls this."""
    import torch

    from gowide_dist import world as worlds
    from gowide_dist.train.loop import TrainContext, train_together

    os.environ.pop("WANDB_PROJECT", None)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # accuracies of untrained networks would confuse
    recipe, checksums = check_data(load_recipe(run.recipe_path))
    with worlds.join() as world, open_images(recipe, world) as images:
        start_s, began = time.time() - launched, time.monotonic()
        images.val.steps_per_epoch = min(images.val.steps_per_epoch, steps_per_epoch)

        def train(seed: int) -> Any:
            loader = images.train(seed)
            loader.steps_per_epoch = steps_per_epoch
            return loader

        ctx = TrainContext(recipe, run, world, replace(images, train=train), identities(recipe, checksums))
        timer = threading.Timer(limit_s, os.kill, (os.getpid(), signal.SIGUSR2))  # as Slurm does when time is up
        timer.daemon = True
        timer.start()
        with suppress(Stopped):
            train_together([recipe.instances[key] for key in keys], ctx)
        timer.cancel()
        on_gpu = world.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else _memory_bytes("VmHWM")
        peaks = world.gather(torch.tensor([peak], device=world.device))
        report = {
            "start_s": start_s,
            "seconds": time.monotonic() - began,
            "memory_bytes": int(peaks.max()),
            "validation_batches": images.val.steps_per_epoch,
        }
        if world.is_main:
            write_atomically(run.path / "steps.json", json.dumps(report))


def _memory_bytes(key: str) -> int:
    """VmRSS: resident memory of this process now; VmHWM: its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> int:
    """Entry of each process of `run_steps`; exit status as of `pipeline.main`."""
    folder, steps_per_epoch, limit_s, launched, *keys = sys.argv[1:]
    task = functools.partial(
        _train_steps, Run(Path(folder)), keys, int(steps_per_epoch), float(limit_s), float(launched)
    )
    return work(task, Path(folder))


if __name__ == "__main__":
    leave(main())
