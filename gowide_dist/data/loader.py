"""The data stream: one process's share of every batch, in an order that is the same for any number of processes."""

import math
import time
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
    order_report,
    quasi_random_order,
    random_order,
    training_batch,
    validation_share,
)
from gowide_dist.data.threads import DaemonThreads
from gowide_dist.errors import DataError

_BATCHES_AHEAD = 2  # finished ones, beside those that the threads are working on
_WINDOW_PAGES = 256  # 2 GiB of the file

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


class Loader:
    """One process's share of the data stream of an FFCV file.

    batch_size: of all processes together; num_threads: of this process; resolution: side of the images in pixels.

    Training (train=True) goes through all samples in a random order, in whole batches. The images are augmented, keyed
    by (seed, epoch, sample): flipped half of the time if `flip`, and either shifted by up to `translate` pixels or,
    with crop_scale (least and greatest part of the area) and crop_ratio (width over height), cropped and resized.
    order="quasi-random" reads a window of `window_pages` pages (8 MiB each) at a time, ahead: for files larger than
    memory on slow disks.

    Validation goes once through this process's part of the samples, or through `samples` alone (int64 [N]), as they are
    or, with center_crop_ratio, resized to resolution / center_crop_ratio on the shorter side and cropped in the middle.

    seconds_waited: how long the consumer has waited for batches, in all. memory_bytes: what the loader takes at most,
    beside the cache of the file. Raises DataError if the file is damaged, if its images do not fit, or if it cannot be
    read within timeout_s.
    """

    def __init__(
        self,
        beton: Path,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        train: bool,
        seed: int = 0,
        flip: bool = False,
        translate: int = 0,
        crop_scale: tuple[float, float] | None = None,
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        center_crop_ratio: float | None = None,
        samples: Indices | None = None,
        resolution: int,
        order: Literal["random", "quasi-random"] = "random",
        window_pages: int = _WINDOW_PAGES,
        num_threads: int = 1,
        timeout_s: float = 300.0,
    ):
        self._path, self._timeout_s, self._stalled = beton, timeout_s, False
        self._train, self._seed = train, seed
        self._batch_size, self._share = batch_size, batch_size // world_size
        self._rank, self._world_size = rank, world_size
        self._resolution, self._order, self._window_pages = resolution, order, window_pages
        self.seconds_waited = 0.0
        # Waiting for an event of another GPU, a thread on the first would take half a GB of that one's memory.
        on_gpu = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._threads = DaemonThreads(num_threads, on_gpu)
        try:
            self._beton = self._wait(self._threads.submit(partial(Beton, beton)))
            self.num_samples = len(self._beton)
            self._validation = validation_share(self.num_samples, rank, world_size) if samples is None else samples
            self.steps_per_epoch = self.num_samples // batch_size if train else -(-len(self._validation) // self._share)
            if not train and samples is None and self.num_samples < world_size:
                raise DataError(f"{beton}: {self.num_samples:,} images for {world_size} processes; take fewer of these")
            if train and not self.steps_per_epoch:
                raise DataError(f"{beton}: {self.num_samples:,} images, fewer than one batch of {batch_size:,}")
            self._geometry: decode.Shift | decode.RandomCrop | decode.CenterCrop
            if train and crop_scale:
                self._geometry = decode.RandomCrop(flip, *map(float, crop_scale), *map(float, crop_ratio))
            elif not train and center_crop_ratio:
                self._geometry = decode.CenterCrop(float(center_crop_ratio))
            else:
                self._check_sides()
                self._geometry = decode.Shift(flip, translate) if train else decode.Shift(False, 0)
            self._ahead = num_threads + _BATCHES_AHEAD
            shape = (self._ahead + 1, self._share * resolution * resolution * 3)  # one more, which the consumer holds
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
        self.seconds_waited = 0.0

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
            return training_batch(order, step, self._batch_size, self._rank, self._world_size)
        return order[step * self._share : (step + 1) * self._share]

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
        start = time.monotonic()
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            self._stalled = True
            raise DataError(
                f"{self._path}: nothing came within {self._timeout_s:g} s; is the file system reachable?"
            ) from None
        finally:
            self.seconds_waited += time.monotonic() - start

    def _check_memory(self, wanted: int) -> None:
        available = available_memory_bytes()
        if wanted > available:
            raise DataError(
                f"{self._path}: loading takes {wanted / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are "
                "free; take a smaller batch, fewer threads or more processes"
            )

    def _check_sides(self) -> None:
        sides = np.concatenate([self._beton.heights, self._beton.widths])
        if sides.min() != self._resolution or sides.max() != self._resolution:
            raise DataError(
                f"{self._path}: images of {sides.min()} to {sides.max()} px, but the resolution is {self._resolution}; "
                "set it to theirs, or crop_scale and center_crop_ratio to crop and resize"
            )


def describe_orders(beton: Path, batch_size: int) -> dict[str, dict[str, float]]:
    """How random and how local each order of a file's samples is in its first epoch; see `order_report`.

    Raises DataError if there are fewer samples than a batch has.
    """
    pages = Beton(beton).pages
    if len(pages) < batch_size:
        raise DataError(f"batch size {batch_size:,} is more than the {len(pages):,} images of {beton}")
    orders = {
        "random": random_order(len(pages), seed=0, epoch=0),
        "quasi-random": quasi_random_order(pages, _WINDOW_PAGES, seed=0, epoch=0)[0],
    }
    return {name: order_report(order, pages, batch_size) for name, order in orders.items()}
