"""Does this machine feed and train a recipe: its loader against the usual ones, and a few real steps of every stage.

Importing this imports no torch.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias

from gowide_dist.data.info import read_dataset_info
from gowide_dist.errors import DataError
from gowide_dist.machine import num_cores
from gowide_dist.progress import say
from gowide_dist.recipe import Augment, Recipe
from gowide_dist.steps import memory_bytes, run_steps
from gowide_dist.timeline import Batching

_ROUNDS = 3
Table: TypeAlias = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head and rows
Epoch: TypeAlias = Callable[[int], int]  # runs an epoch, returns its number of images
_RATIOS = {"ffcv": "over_ffcv", "torchvision": "over_torchvision", "decode_only": "of_decode_only"}


class Reading(NamedTuple):
    """What all loaders read and give: batches of `side` px, cropped at random, or else only shifted.

    augment: of it the policy, jitter and erasing, by this loader and by torchvision's; stock FFCV has them not.
    """

    path: Path
    batch_size: int
    side: int
    cropped: bool
    num_threads: int
    augment: Augment


def machine() -> dict[str, Any]:
    """What the measurements are made on."""
    import torch

    cores = num_cores()
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": int(os.environ.get("OMP_NUM_THREADS", cores)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "load_average": round(os.getloadavg()[0], 1),  # above the number of cores, seconds are noise
    }


def cpu_name() -> str:
    """The processor's name, or its architecture where Linux has no name for it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "") or platform.machine()


def stages(recipe: Recipe, num_processes: int) -> dict[str, dict[str, Any]]:
    """What a few steps of each stage of the recipe take, its networks together. Raises UserError as training does."""
    results = {}
    for name, stage in recipe.stages.items():
        if stage.epochs:
            say(f"{name}: a few training steps, processes: {num_processes}")
            times = run_steps(recipe, [f"{name}/{network}" for network in stage.train], num_processes)
            results[name] = {
                "images_per_s": round(recipe.batch_size / times.step_s, 1),
                "data_wait": round(times.data_wait, 3),
                "memory_mib": round(times.memory_bytes / 2**20),
                "steps": times.num_steps,
            }
    return results


def tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """The results of `loader` and `stages`, by these names, for people."""
    rows: list[tuple[str, ...]]
    if loaders := results.get("loader"):
        rows = [
            (name, f"{rate:,}", str(loaders.get(_RATIOS.get(name, ""), "")), f"{loaders['memory_mib'][name]:,}")
            for name, rate in loaders["images_per_s"].items()
        ]
        yield ("loader", "images/s", "gowide_dist over it", "memory growth, MiB"), rows
    if stages := results.get("stages"):
        rows = [
            (name, f"{stage['images_per_s']:,.0f}", f"{stage['data_wait']:.1%}", f"{stage['memory_mib']:,}")
            for name, stage in stages.items()
        ]
        yield ("stage", "images/s", "time waiting for data", "peak memory of a process, MiB"), rows


def loader(
    data_dir: Path, images_dir: Path | None = None, *,
    batch_size: int, resolution: int | None = None, augment: Augment | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Epochs of the loader beside stock FFCV, torchvision and the bare decoding of every image.

    data_dir: a folder that `gowide encode` wrote. images_dir: the same images for torchvision's ImageFolder (class
    folders, or a folder `train` of them). Variable or large images are cropped at random to `resolution` (default 224)
    and flipped, small fixed ones shifted and flipped. augment: its policy, jitter and erasing are applied too, but by
    stock FFCV and the bare decoding.

    Returns `over_ffcv`, `over_torchvision` (with images_dir), `of_decode_only` (where there are JPEGs) and
    `memory_over_ffcv`: medians of the ratios of the rounds; and what they come from, `images_per_s` and `memory_mib`
    (peak growth after the imports). Raises DataError where a folder is missing.
    """
    beton, num_threads = data_dir / "train.beton", num_cores()
    info = read_dataset_info(beton)
    is_cropped = resolution is not None or info.fixed_side_px is None
    reading = Reading(
        beton, batch_size, resolution or info.fixed_side_px or 224, is_cropped, num_threads, augment or Augment()
    )
    readings = {"gowide_dist": reading, "ffcv": reading}
    if info.encoding.get("jpg_share"):
        readings["decode_only"] = reading
    if images_dir is not None:
        folder = images_dir / "train" if (images_dir / "train").is_dir() else images_dir
        if not folder.is_dir():
            raise DataError(f"{folder}: not found; give the folder of class folders as --images")
        readings["torchvision"] = reading._replace(path=folder)
    rates: dict[str, list[float]] = {name: [] for name in readings}
    memory: dict[str, int] = {}
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")  # each loader in a process that no other warms up
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in readings}
        for epoch in range(_ROUNDS + 1):
            for name, each in readings.items():
                rate, memory[name] = processes[name].submit(_run_epoch, name, each, epoch).result()
                rates[name] += [rate] if epoch else []  # the first compiles, and warms the system's file cache
    ratios = {name: median(map(truediv, rates["gowide_dist"], rates[name])) for name in _RATIOS if name in rates}
    return {
        **{_RATIOS[name]: round(ratio, 3) for name, ratio in ratios.items()},
        "memory_over_ffcv": round(memory["gowide_dist"] / memory["ffcv"], 3),
        "images_per_s": {name: round(median(values)) for name, values in rates.items()},
        "memory_mib": {name: round(value / 2**20) for name, value in memory.items()},
    }


def _run_epoch(name: str, reading: Reading, epoch: int) -> tuple[float, int]:
    """Images per second of an epoch in this process, and the peak growth of its memory."""
    before, run = _open(name, reading)
    start = time.perf_counter()
    num_images = run(epoch)
    return num_images / (time.perf_counter() - start), memory_bytes("VmHWM") - before


@functools.cache
def _open(name: str, reading: Reading) -> tuple[int, Epoch]:
    """Memory after the imports, which count as no growth, and the opened loader."""
    for module in ("cv2", "torch", *(["ffcv.loader"] if name == "ffcv" else [])):
        importlib.import_module(module)
    loaders = {"gowide_dist": _own, "ffcv": _ffcv, "decode_only": _decode_only, "torchvision": _torchvision}
    return memory_bytes("VmRSS"), loaders[name](reading)


def _own(reading: Reading) -> Epoch:
    from gowide_dist.data.decode import RandomResizedCrop, Shift
    from gowide_dist.data.loader import Loader, augmentations_of

    geometry = RandomResizedCrop(True, 0.08, 1.0, 3 / 4, 4 / 3) if reading.cropped else Shift(True, 4)
    batching, threads = Batching(reading.batch_size), reading.num_threads
    augmentations = tuple(augmentations_of(reading.augment, read_dataset_info(reading.path).mean))
    stream = Loader(
        reading.path, batching, train=True, geometry=geometry, augmentations=augmentations, resolution=reading.side,
        num_threads=threads,
    )  # fmt: skip
    return lambda epoch: sum(len(batch.images) for batch in stream.batches(epoch))


def _ffcv(reading: Reading) -> Epoch:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate, ToTensor

    if reading.cropped:
        images = [RandomResizedCropRGBImageDecoder((reading.side, reading.side)), RandomHorizontalFlip(), ToTensor()]
    else:
        images = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(4), ToTensor()]
    path, batch_size, order = str(reading.path), reading.batch_size, OrderOption.RANDOM
    stream = Loader(path, batch_size, reading.num_threads, order=order, seed=0, pipelines={"image": images})
    return lambda _: sum(len(images) for images, _ in stream)


def _decode_only(reading: Reading) -> Epoch:
    """Every image decoded whole by the same JPEG library, and nothing else."""
    import numpy as np

    from gowide_dist.data import decode
    from gowide_dist.data.beton import JPEG, Beton

    source = decode.BetonArrays.of(Beton(reading.path))
    parts = np.array_split(np.flatnonzero(source.modes == JPEG), reading.num_threads)
    scratches = [decode.Scratch.of(source) for _ in parts]
    threads = ThreadPoolExecutor(reading.num_threads)

    def epoch(_: int) -> int:
        list(threads.map(functools.partial(decode.decode_whole, source), parts, scratches))
        return sum(map(len, parts))

    return epoch


def _torchvision(reading: Reading) -> Epoch:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(reading.side) if reading.cropped else v2.RandomCrop(reading.side, padding=4)
    transforms = [crop, v2.RandomHorizontalFlip()]
    if reading.augment.trivial_augment:
        transforms.append(v2.TrivialAugmentWide())
    if policy := reading.augment.rand_augment:
        transforms.append(v2.RandAugment(policy.num_ops, policy.magnitude))
    if jitter := reading.augment.color_jitter:
        transforms.append(v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue))
    transforms.append(v2.PILToTensor())
    if erase := reading.augment.erase:
        transforms.append(v2.RandomErasing(erase.probability, erase.scale, erase.ratio))
    images = ImageFolder(reading.path, v2.Compose(transforms))
    size, workers = reading.batch_size, reading.num_threads
    stream = DataLoader(images, size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True)
    return lambda _: sum(len(images) for images, _ in stream)
