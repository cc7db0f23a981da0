"""The data stream: one process's part of every batch, in an order that is the same for any number of processes."""

import math
import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gowide_dist.data import decode
from gowide_dist.data.augment import DRAWN, Augmentation, ColorJitter, Policy, RandomErasing, augment
from gowide_dist.data.beton import Beton
from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.data.order import (
    AUGMENT_STREAM,
    epoch_key,
    quasi_random_order,
    random_order,
    read_ahead_schedule,
    validation_part,
)
from gowide_dist.errors import DataError, StallError
from gowide_dist.networks.normalise import Channels
from gowide_dist.recipe import Augment, Data
from gowide_dist.timeline import Batching
from gowide_dist.world import copy_stream

_BATCHES_AHEAD = 2  # decoded ones that wait, beside one in the hands of each thread

Result = TypeVar("Result")
Indices: TypeAlias = NDArray[np.int64]


class Batch(NamedTuple):
    """images: uint8 [B, H, W, 3] RGB, pinned where there is a GPU; labels: int64 [B]; sample indices: int64 [B].

    The images are valid until the next batch is asked for: then their memory is used again. A copy to a GPU that
    `world.to_device` has started by then is waited for.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


def geometry_of(data: Data, *, train: bool) -> decode.Geometry:
    """The geometry of a recipe's images: training images with augmentation, validation images without."""
    augment = data.augment
    if train and augment.crop:
        return decode.RandomResizedCrop(augment.flip, *augment.crop.scale, *augment.crop.ratio)
    if train:
        return decode.Shift(augment.flip, augment.translate)
    return decode.CenterCrop(data.center_crop) if data.center_crop else decode.UNCHANGED


def augmentations_of(settings: Augment, mean: Channels) -> Iterator[Augmentation]:
    """What follows the geometry of training images, in this order. mean: of the channels, which fills erased boxes."""
    if settings.trivial_augment:
        yield Policy(wide=True, num_ops=1, magnitude=DRAWN)
    if policy := settings.rand_augment:
        yield Policy(wide=False, num_ops=policy.num_ops, magnitude=policy.magnitude)
    if jitter := settings.color_jitter:
        yield ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    if erase := settings.erase:
        red, green, blue = (round(channel * 255) for channel in mean)
        yield RandomErasing(erase.probability, *erase.scale, *erase.ratio, (red, green, blue))


class Loader:
    """One process's part of the data stream of an FFCV file.

    Training (train=True) goes through all samples in a random order, in whole batches. The images are changed as
    `geometry` and then `augmentations` say, keyed by (seed, epoch, sample). order="quasi-random" reads a window of
    `window_pages` pages (8 MiB each) at a time, ahead: for files larger than memory on slow disks. Validation goes once
    through this process's part of the samples, or through `samples` alone (int64 [N]).

    resolution: side of the images in pixels. num_threads: decoding threads of this process. Raises DataError if the
    file is damaged, if its images or the free memory do not fit, or if it cannot be read within timeout_s.
    """

    def __init__(
        self,
        beton: Path,
        batching: Batching,
        *,
        train: bool,
        resolution: int,
        geometry: decode.Geometry = decode.UNCHANGED,
        augmentations: Iterable[Augmentation] = (),
        seed: int = 0,
        samples: Indices | None = None,
        order: Literal["random", "quasi-random"] = "random",
        window_pages: int = 256,
        num_threads: int = 1,
        timeout_s: float = 300.0,
    ):
        self._path, self._seed = beton, seed
        self._geometry, self._augmentations, self._resolution = geometry, tuple(augmentations), resolution
        self._order, self._window_pages = order, window_pages
        self._timeout_s, self._stalled = timeout_s, False
        self._num_ahead = num_threads + _BATCHES_AHEAD
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._threads = ThreadPool(num_threads)  # daemons: one stuck in a hanging file system does not keep the process
        try:
            self._beton = self._wait(self._threads.apply_async(Beton, (beton,)))
            self.num_samples = len(self._beton)
            _check_images(self._beton, batching, geometry, resolution, train=train, chosen=samples is not None)
            if train:
                self._batching, self.steps_per_epoch = batching, self.num_samples // batching.global_batch
            else:  # a process goes through its part of the samples alone
                if samples is None:
                    samples = validation_part(self.num_samples, batching.rank, batching.num_processes)
                self._batching = Batching(batching.local_batch)
                self.steps_per_epoch = math.ceil(len(samples) / batching.local_batch)
            self._samples = samples
            self._arrays = decode.BetonArrays.of(self._beton)
            scratches = [decode.Scratch.of(self._arrays) for _ in range(num_threads)]
            buffers = self._num_ahead + 1, batching.local_batch * resolution * resolution * 3
            _check_memory(beton, math.prod(buffers) + sum(array.nbytes for scratch in scratches for array in scratch))
        except Exception:
            self.close()
            raise
        self._scratches = deque(scratches)
        self._pending: deque[AsyncResult[Batch]] = deque()
        # A ring: step s uses buffer s modulo N, and N is one more than the batches ahead of the consumer, which still
        # holds the last one it was given. When it asks for batch s it returns that of step s - 1, and step
        # s + num_ahead is submitted, into the same buffer: s + num_ahead = s - 1 modulo N.
        # Where there is a GPU the memory is pinned: a copy to the GPU then runs beside the computation.
        self._buffers = torch.empty(buffers, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def class_counts(self, num_classes: int) -> Tensor:
        """How many images of the file each class has: int64 [K]."""
        return torch.bincount(torch.from_numpy(self._beton.labels), minlength=num_classes)

    def preflight(self, num_classes: int) -> None:
        """Check before a long run: labels in range, a first batch in time. Raises DataError."""
        low, high = self._beton.labels.min(), self._beton.labels.max()
        if low < 0 or high >= num_classes:
            raise DataError(f"{self._path}: labels {low} to {high}, but there are {num_classes} classes")
        with closing(self.batches()) as batches:
            next(batches)

    def batches(self, epoch: int = 0, start: int = 0, resolution: int | None = None) -> Generator[Batch, None, None]:
        """The batches of an epoch from step `start` on. One iteration at a time, which may be left early.

        resolution: of this epoch's images, at most the loader's. Raises DataError if a batch does not come within
        timeout_s.
        """
        side = resolution or self._resolution
        order, read_ahead = self._epoch_order(epoch, start)
        key = epoch_key(self._seed, epoch, AUGMENT_STREAM)
        steps = iter(range(start, self.steps_per_epoch))
        pending = self._pending
        while pending:  # of an iteration left early: those batches are still being written into the buffers
            pending.popleft().wait(self._timeout_s)

        def submit(count: int) -> None:
            # The consumer may have returned a buffer whose copy to the GPU still runs. This event is behind the copy,
            # and not behind the step that it was for; a thread that waits for it sleeps, where it would else spin.
            copied: torch.cuda.Event | None = None
            if self._device:
                copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                copied.record(copy_stream(self._device))
            for step in islice(steps, count):
                while read_ahead and read_ahead[0][0] <= step:
                    self._beton.read_ahead(read_ahead.popleft()[1])
                rows = self._batching.local_rows(step)
                indices = order[rows.start : rows.stop]
                buffer = self._buffers[step % len(self._buffers)]
                images = buffer[: len(indices) * side * side * 3].view(len(indices), side, side, 3)
                pending.append(self._threads.apply_async(self._decode, (indices, key, images, copied)))

        submit(self._num_ahead)
        while pending:
            submit(1)  # into the buffer that the consumer has just returned
            yield self._wait(pending.popleft())

    def close(self) -> None:
        """End the threads, except a stuck one: it ends with the process."""
        if not self._stalled:
            self._threads.close()
            self._threads.join()

    def _epoch_order(self, epoch: int, start: int) -> tuple[Indices, deque[tuple[int, int]]]:
        """The epoch's order of the samples (in validation this process's part of them), and the pages to read ahead."""
        if self._samples is not None:
            return self._samples, deque()
        if self._order == "random":
            return random_order(self.num_samples, self._seed, epoch), deque()
        order, pages = quasi_random_order(self._beton.pages, self._window_pages, self._seed, epoch)
        return order, read_ahead_schedule(pages, self._window_pages, self.steps_per_epoch, start)

    def _decode(self, indices: Indices, key: np.uint64, images: Tensor, copied: torch.cuda.Event | None) -> Batch:
        if copied is not None:
            torch.cuda.set_device(self._device)  # or waiting would open a context of half a GB on the first GPU
            copied.synchronize()
        scratch = self._scratches.pop()  # as many as threads
        try:
            decode.fill(self._arrays, indices, key, self._geometry, images.numpy(), scratch)
            for augmentation in self._augmentations:
                augment(images.numpy(), indices, key, augmentation)
        finally:
            self._scratches.append(scratch)
        return Batch(images, torch.from_numpy(self._beton.labels[indices]), torch.from_numpy(indices))

    def _wait(self, result: "AsyncResult[Result]") -> Result:
        try:
            return result.get(self._timeout_s)
        except multiprocessing.TimeoutError:
            self._stalled = True
            line = f"{self._path}: no data within {self._timeout_s:g} s; is the file system hanging?"
            raise StallError(line) from None


def _check_images(
    beton: Beton, batching: Batching, geometry: decode.Geometry, resolution: int, *, train: bool, chosen: bool
) -> None:
    """Raises DataError if the images are too few, or if a Shift gets images of other sides than the resolution."""
    num, num_processes = len(beton), batching.num_processes
    if train and num < batching.global_batch:
        raise DataError(f"{beton.path}: {num:,} images, fewer than one batch of {batching.global_batch:,}")
    if not train and not chosen and num < num_processes:
        raise DataError(f"{beton.path}: {num:,} images for {num_processes} processes; start at most {num:,}")
    sides = np.concatenate([beton.heights, beton.widths])
    if isinstance(geometry, decode.Shift) and (sides.min() != resolution or sides.max() != resolution):
        raise DataError(
            f"{beton.path}: images of {sides.min()} to {sides.max()} px, but the resolution is {resolution}; "
            "make data.resolution their side, or crop and resize them (data.augment.crop, data.center_crop)"
        )


def _check_memory(path: Path, needed_bytes: int) -> None:
    if needed_bytes > (available := available_memory_bytes()):
        raise DataError(
            f"{path}: loading takes {needed_bytes / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free; "
            "take a smaller batch, fewer threads or more processes"
        )
