"""The data stream: one process's share of every batch, in an order that is the same for any number of processes."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gowide_dist.data.beton import RAW, Beton
from gowide_dist.data.decode import decode_translated
from gowide_dist.data.order import AUGMENT_STREAM, epoch_key, random_order, training_batch, validation_share
from gowide_dist.errors import DataError

_BATCHES_AHEAD = 2  # finished ones, beside those that the threads are working on


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

    batch_size: of all processes together; num_threads: of this process.
    Training (train=True) goes through a random order, whole batches only; flip and translate (pixels) augment, keyed by
    (seed, epoch, sample). Validation goes through this process's part of the samples once, as they are.
    resolution: side of the images in pixels. Raises DataError if the file is damaged or its images do not fit.

    seconds_waited: how long the consumer has waited for batches, in all.
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
        resolution: int,
        num_threads: int = 1,
        timeout_s: float = 300.0,
    ):
        self._beton = Beton(beton)
        self.num_samples = len(self._beton)
        self.seconds_waited = 0.0
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._train, self._seed, self._flip, self._translate = train, seed, flip, translate
        self._timeout_s = timeout_s
        sides = np.unique(np.concatenate([self._beton.heights, self._beton.widths]))
        if sides.tolist() != [resolution]:
            raise DataError(f"{beton}: images of {sides.min()} to {sides.max()} px, but the resolution is {resolution}")
        if (self._beton.modes != RAW).any():
            raise DataError(f"{beton}: images in JPEG")
        share = batch_size // world_size
        self._share = share
        self._validation = validation_share(self.num_samples, rank, world_size)
        self.steps_per_epoch = self.num_samples // batch_size if train else -(-len(self._validation) // share)
        if not self.steps_per_epoch and train:
            raise DataError(f"{beton}: {self.num_samples:,} images, fewer than one batch of {batch_size:,}")

        self._ahead = num_threads + _BATCHES_AHEAD
        shape = (self._ahead + 1, share, resolution, resolution, 3)  # one more, which the consumer holds
        self._buffers = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="loader")

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on. One iteration at a time; closing it early stops the work ahead.

        Raises DataError if a batch does not come within timeout_s.
        """
        order = random_order(self.num_samples, self._seed, epoch) if self._train else self._validation
        key = epoch_key(self._seed, epoch, AUGMENT_STREAM)
        steps = iter(range(start, self.steps_per_epoch))
        pending: deque[Future[Batch]] = deque()

        def submit(count: int) -> None:
            copied = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
            for step in islice(steps, count):
                buffer = self._buffers[step % len(self._buffers)]
                pending.append(self._threads.submit(self._decode, self._indices(order, step), key, buffer, copied))

        try:
            submit(self._ahead)
            while pending:
                submit(1)  # into the buffer that the consumer has just given back
                yield self._wait(pending.popleft())
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def close(self) -> None:
        """End the threads. An iteration that is still open is over."""
        self._threads.shutdown(cancel_futures=True)

    def _indices(self, order: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        if self._train:
            return training_batch(order, step, self._batch_size, self._rank, self._world_size)
        return order[step * self._share : (step + 1) * self._share]

    def _decode(
        self, indices: NDArray[np.int64], key: np.uint64, buffer: Tensor, copied: torch.cuda.Event | None
    ) -> Batch:
        if copied is not None:
            copied.synchronize()
        images, beton = buffer[: len(indices)], self._beton
        decode_translated(beton.bytes, beton.offsets, indices, key, self._flip, self._translate, images.numpy())
        return Batch(images, torch.from_numpy(beton.labels[indices]), torch.from_numpy(indices))

    def _wait(self, future: Future[Batch]) -> Batch:
        start = time.monotonic()
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            raise DataError(
                f"{self._beton.path}: no batch within {self._timeout_s:g} s; is the file system reachable?"
            ) from None
        finally:
            self.seconds_waited += time.monotonic() - start
