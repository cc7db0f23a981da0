"""The data stream: one process's share of every batch, in an order that is the same for any number of processes."""

import math
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, wait
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gowide_dist.data import decode
from gowide_dist.data.beton import Beton
from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.data.order import (
    AUGMENT_STREAM,
    epoch_key,
    quasi_random_order,
    random_order,
    validation_part,
)
from gowide_dist.data.threads import DaemonThreads
from gowide_dist.errors import DataError
from gowide_dist.recipe import Data
from gowide_dist.timeline import Batching

_BATCHES_AHEAD = 2  # finished ones, beside those that the threads are working on
_WINDOW_PAGES = 256  # 2 GiB of the file
_AS_THEY_ARE = decode.Shift(False, 0)

Result = TypeVar("Result")
Indices: TypeAlias = NDArray[np.int64]


class Batch(NamedTuple):
    """images: uint8 [B, H, W, 3] RGB, pinned where there is a GPU; labels: int64 [B]; sample indices: int64 [B].

    The images are valid until the next batch is asked for: their memory is used again. A copy to a GPU that has been
    started by then, on the current stream, is waited for.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


def geometry_of(data: Data, *, train: bool) -> decode.Geometry:
    """How a recipe wants its images cut: training images with augmentation, validation images without."""
    augment = data.augment
    if train and augment.crop:
        return decode.RandomCrop(augment.flip, *augment.crop.scale, *augment.crop.ratio)
    if train:
        return decode.Shift(augment.flip, augment.translate)
    return decode.CenterCrop(data.center_crop) if data.center_crop else _AS_THEY_ARE


class Loader:
    """One process's part of the data stream of an FFCV file.

    Training (train=True) goes through all samples in a random order, in whole batches. The images are augmented as
    `geometry` says, keyed by (seed, epoch, sample). order="quasi-random" reads a window of `window_pages` pages (8 MiB
    each) at a time, ahead: for files larger than memory on slow disks.

    Validation goes once through this process's part of the samples, or through `samples` alone (int64 [N]).

    resolution: side of the images in pixels. num_threads: decoding threads of this process. memory_bytes: what the
    loader takes at most, beside the cache of the file. Raises DataError if the file is damaged, if its images do not
    fit, or if it cannot be read within timeout_s.
    """

    def __init__(
        self,
        beton: Path,
        batching: Batching,
        *,
        train: bool,
        resolution: int,
        geometry: decode.Geometry = _AS_THEY_ARE,
        seed: int = 0,
        samples: Indices | None = None,
        order: Literal["random", "quasi-random"] = "random",
        window_pages: int = _WINDOW_PAGES,
        num_threads: int = 1,
        timeout_s: float = 300.0,
    ):
        self._path, self._timeout_s, self._stalled = beton, timeout_s, False
        self._batching, self._train, self._seed = batching, train, seed
        self._geometry, self._resolution, self._order, self._window_pages = geometry, resolution, order, window_pages
        # Waiting for an event of another GPU, a thread on the first would take half a GB of that one's memory.
        on_gpu = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._threads = DaemonThreads(num_threads, on_gpu)
        # A buffer for each batch that is being decoded or waits, and one more: the consumer still holds the last.
        self._ahead = num_threads + _BATCHES_AHEAD
        shape = (self._ahead + 1, batching.local_batch * resolution * resolution * 3)
        try:
            self._beton = self._wait(self._threads.submit(partial(Beton, beton)))
            self.num_samples = len(self._beton)
            self._validation = (
                validation_part(self.num_samples, batching.rank, batching.num_processes) if samples is None else samples
            )
            self.steps_per_epoch = (
                self.num_samples // batching.global_batch
                if train
                else math.ceil(len(self._validation) / batching.local_batch)
            )
            self._check_samples(given=samples is not None)
            if isinstance(geometry, decode.Shift):
                self._check_sides()
            self._check_memory(math.prod(shape))
        except DataError:
            self.close()
            raise

        self._source = decode.source_of(self._beton)
        self._scratch: SimpleQueue[decode.Scratch] = SimpleQueue()
        self._buffers = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.memory_bytes = self._buffers.nbytes
        for _ in range(num_threads):
            scratch = decode.Scratch.of(self._source)
            self.memory_bytes += scratch.jpeg.nbytes + scratch.pixels.nbytes
            self._scratch.put(scratch)

    def preflight(self, num_classes: int) -> None:
        """Find out before a long run: labels in range, memory enough, a first batch in time. Raises DataError."""
        labels = self._beton.labels
        if labels.min() < 0 or labels.max() >= num_classes:
            raise DataError(
                f"{self._path}: labels {labels.min()} to {labels.max()}, but there are {num_classes} classes"
            )
        self._check_memory(self.memory_bytes)
        batches = self.batches()
        next(batches)
        batches.close()

    def batches(self, epoch: int = 0, start: int = 0, resolution: int | None = None) -> Generator[Batch, None, None]:
        """The batches of an epoch from step `start` on. One iteration at a time; closing it early stops the work ahead.

        resolution: of this epoch's images, at most the loader's. Raises DataError if a batch does not come within
        timeout_s.
        """
        side = resolution or self._resolution
        order, pages = self._epoch_order(epoch, start)
        key = epoch_key(self._seed, epoch, AUGMENT_STREAM)
        steps = iter(range(start, self.steps_per_epoch))
        pending: deque[Future[Batch]] = deque()

        def submit(count: int) -> None:
            copied = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
            for step in islice(steps, count):
                while pages and pages[0][0] <= step:
                    self._beton.read_ahead(pages.popleft()[1])
                images = self._buffers[step % len(self._buffers)]
                indices = self._indices(order, step)
                images = images[: len(indices) * side * side * 3].view(len(indices), side, side, 3)
                pending.append(self._threads.submit(partial(self._decode, indices, key, images, copied)))

        try:
            submit(self._ahead)
            while pending:
                submit(1)  # into the buffer that the consumer has just given back
                yield self._wait(pending.popleft())
        finally:
            for future in pending:
                future.cancel()
            if not self._stalled:
                wait(pending)

    def close(self) -> None:
        """End the threads, but for one that is stuck: it ends with the process."""
        if not self._stalled:
            self._threads.close()

    def _epoch_order(self, epoch: int, start: int) -> tuple[Indices, deque[tuple[int, int]]]:
        """The order of samples of all processes (in validation, of this one), and when to read which page ahead.

        The latter as (step, page): a window before the page is needed, evenly over the epoch; without those that the
        steps before `start` alone need.
        """
        if not self._train:
            return self._validation, deque()
        if self._order == "random":
            return random_order(self.num_samples, self._seed, epoch), deque()
        order, pages = quasi_random_order(self._beton.pages, self._window_pages, self._seed, epoch)
        rank, window = np.arange(len(pages)), self._window_pages
        steps = (rank - window) * self.steps_per_epoch // len(pages)
        left = (rank // window + 1) * window * self.steps_per_epoch > start * len(pages)
        return order, deque(zip(steps[left].tolist(), pages[left].tolist(), strict=True))

    def _indices(self, order: Indices, step: int) -> Indices:
        if self._train:
            rows = self._batching.local_rows(step)
            return order[rows.start : rows.stop]
        local_batch = self._batching.local_batch
        return order[step * local_batch : (step + 1) * local_batch]

    def _decode(self, indices: Indices, key: np.uint64, images: Tensor, copied: torch.cuda.Event | None) -> Batch:
        if copied is not None:
            copied.synchronize()
        scratch = self._scratch.get()
        try:
            decode.fill(self._source, indices, key, self._geometry, images.numpy(), scratch)
        finally:
            self._scratch.put(scratch)
        return Batch(images, torch.from_numpy(self._beton.labels[indices]), torch.from_numpy(indices))

    def _wait(self, future: Future[Result]) -> Result:
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            self._stalled = True
            raise DataError(
                f"{self._path}: nothing came within {self._timeout_s:g} s; is the file system reachable?"
            ) from None

    def _check_memory(self, wanted: int) -> None:
        available = available_memory_bytes()
        if wanted > available:
            raise DataError(
                f"{self._path}: loading takes {wanted / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are "
                "free; take a smaller batch, fewer threads or more processes"
            )

    def _check_samples(self, *, given: bool) -> None:
        batching = self._batching
        if not self._train and not given and self.num_samples < batching.num_processes:
            raise DataError(
                f"{self._path}: {self.num_samples:,} images for {batching.num_processes} processes; take fewer of these"
            )
        if self._train and not self.steps_per_epoch:
            raise DataError(
                f"{self._path}: {self.num_samples:,} images, fewer than one batch of {batching.global_batch:,}"
            )

    def _check_sides(self) -> None:
        sides = np.concatenate([self._beton.heights, self._beton.widths])
        if sides.min() != self._resolution or sides.max() != self._resolution:
            raise DataError(
                f"{self._path}: images of {sides.min()} to {sides.max()} px, but the resolution is {self._resolution}; "
                "set it to theirs, or crop and resize (data.augment.crop, data.center_crop)"
            )
