"""Data loading on this machine, against the usual ways: the same images, cores and output, in turns in one run."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from gowide_dist.data.info import read_dataset_info
from gowide_dist.errors import DataError

_ROUNDS = 3

Epoch: TypeAlias = Callable[[int], int]  # runs an epoch, returns how many images it gave


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
    (how far each grew at most, after its imports).
    """
    beton = data_dir / "train.beton"
    info = read_dataset_info(beton)
    cropped = resolution is not None or info.fixed_side_px is None
    side = resolution or info.fixed_side_px or 224
    threads = num_threads or len(os.sched_getaffinity(0))
    settings = batch_size, side, cropped, threads
    contenders: dict[str, Callable[[], Epoch]] = {
        "gowide_dist": partial(_own, beton, *settings),
        "ffcv": partial(_ffcv, beton, *settings),
    }
    if info.encoding.get("jpg_share"):
        contenders["decode_only"] = partial(_decode_only, beton, threads)
    if images_dir is not None:
        folder = images_dir / "train" if (images_dir / "train").is_dir() else images_dir
        if not folder.is_dir():
            raise DataError(f"{folder}: not found; give the folder of class folders as --images")
        contenders["torchvision"] = partial(_torchvision, folder, *settings)
    rates, memory = _race(contenders)

    def ratio(of: str, to: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[of], rates[to], strict=True)), 3)

    result: dict[str, Any] = {"over_ffcv": ratio("gowide_dist", "ffcv")}
    if "torchvision" in rates:
        result["over_torchvision"] = ratio("gowide_dist", "torchvision")
    if "decode_only" in rates:
        result["of_decode_only"] = ratio("gowide_dist", "decode_only")
    result["memory_over_ffcv"] = round(memory["gowide_dist"] / memory["ffcv"], 3)
    result["images_per_s"] = {name: round(statistics.median(values)) for name, values in rates.items()}
    result["memory_mib"] = {name: round(value) for name, value in memory.items()}
    return result


def _race(contenders: dict[str, Callable[[], Epoch]]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Images a second in every round, and growth in MiB. A process each, so that none warms another; one at a time."""
    context = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, float] = {}
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for name, prepare in contenders.items():
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=_compete, args=(theirs, prepare), daemon=name != "torchvision")
            process.start()
            theirs.close()  # so that its death is seen as the end of the pipe
            processes.append(process)
        for pipe in pipes.values():
            pipe.recv()
        for epoch in range(1, _ROUNDS + 1):
            for name, pipe in pipes.items():
                pipe.send(epoch)
                rate, memory[name] = pipe.recv()
                rates[name].append(rate)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()
    return rates, memory


def _compete(pipe: Connection, prepare: Callable[[], Epoch]) -> None:
    import cv2  # noqa: F401  # what all of them import must not count as growth
    import torch  # noqa: F401

    if prepare.func is _ffcv:  # type: ignore[attr-defined]
        import ffcv.loader  # noqa: F401
    before = _memory_mib("VmRSS")
    epoch = prepare()
    epoch(0)  # compiles, and warms the system's file cache
    pipe.send("ready")
    try:
        while True:
            number = pipe.recv()
            start = time.perf_counter()
            num_images = epoch(number)
            pipe.send((num_images / (time.perf_counter() - start), _memory_mib("VmHWM") - before))
    except EOFError:
        return


def _memory_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def _own(beton: Path, batch_size: int, side: int, cropped: bool, threads: int) -> Epoch:
    from gowide_dist.data.decode import RandomResizedCrop, Shift
    from gowide_dist.data.loader import Loader
    from gowide_dist.timeline import Batching

    stream = Loader(
        beton,
        Batching(batch_size),
        train=True,
        geometry=RandomResizedCrop(True, 0.08, 1.0, 3 / 4, 4 / 3) if cropped else Shift(True, 4),
        resolution=side,
        num_threads=threads,
    )
    return lambda epoch: sum(len(batch.images) for batch in stream.batches(epoch))


def _ffcv(beton: Path, batch_size: int, side: int, cropped: bool, threads: int) -> Epoch:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate, ToTensor

    decoder = (
        [RandomResizedCropRGBImageDecoder((side, side)), RandomHorizontalFlip()]
        if cropped
        else [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(4)]
    )
    stream = Loader(
        str(beton),
        batch_size=batch_size,
        num_workers=threads,
        order=OrderOption.RANDOM,
        seed=0,
        pipelines={"image": [*decoder, ToTensor()]},
    )
    return lambda _: sum(len(images) for images, _ in stream)


def _decode_only(beton: Path, threads: int) -> Epoch:
    """Every image decoded whole by the same JPEG library, and nothing else."""
    import numpy as np

    from gowide_dist.data import decode
    from gowide_dist.data.beton import JPEG, Beton
    from gowide_dist.data.threads import DaemonThreads

    arrays = decode.BetonArrays.of(Beton(beton))
    shares = np.array_split(np.flatnonzero(arrays.modes == JPEG), threads)
    scratches = [decode.Scratch.of(arrays) for _ in shares]
    pool = DaemonThreads(threads)

    def epoch(_: int) -> int:
        tasks = [partial(decode.decode_whole, arrays, *work) for work in zip(shares, scratches, strict=True)]
        for future in [pool.submit(task) for task in tasks]:
            future.result()
        return sum(map(len, shares))

    return epoch


def _torchvision(folder: Path, batch_size: int, side: int, cropped: bool, threads: int) -> Epoch:
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    geometry = v2.RandomResizedCrop(side) if cropped else v2.RandomCrop(side, padding=4)
    dataset = ImageFolder(folder, v2.Compose([geometry, v2.RandomHorizontalFlip(), v2.PILToTensor()]))
    stream = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True
    )
    return lambda _: sum(len(images) for images, _ in stream)
