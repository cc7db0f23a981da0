"""Encoding images in worker processes."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from numpy.typing import NDArray

from gowide_dist import stop
from gowide_dist.data.images import BadImage, Item, Sample, Storage, encode_sample
from gowide_dist.data.sources import ImageList
from gowide_dist.errors import DataError
from gowide_dist.machine import num_cores

_CHUNK = 8  # files that a worker is sent at a time; raw ones take up to 8 MB each
_CHUNKS_AHEAD = 4  # for each worker
_SIGNAL_S = 1.0


def encode_images(
    images: ImageList, indices: NDArray[np.int64], storage: Storage, measured_share: float, workers: int = 0
) -> Generator[Sample | BadImage]:
    """Encode images `indices` (int64 [M]) in that order, files in worker processes: how many, no byte depends on."""
    workers = workers or num_cores()
    chunks = (
        [(images.items[index], int(images.labels[index]), index) for index in indices[start : start + _CHUNK].tolist()]
        for start in range(0, len(indices), _CHUNK)
    )
    if isinstance(images.items, np.ndarray) or workers == 1 or not len(indices):
        for chunk in chunks:
            yield from _encode_chunk(chunk, storage, measured_share)
        return
    pending: deque[Future[list[Sample | BadImage]]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker, (os.getpid(),))
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_chunk, chunk, storage, measured_share))
            if len(pending) > workers * _CHUNKS_AHEAD:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        time.sleep(_SIGNAL_S)  # Slurm signals all processes of a job at once: this one's signal then tells more
        raise DataError(
            "a worker process of the encoding died; is there enough memory? run the same command again with fewer "
            "--workers: it goes on from what is encoded"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    """Leave Ctrl-C and Slurm's warning to the parent, and end with it however it ends."""
    for number in (signal.SIGINT, stop.WARNING_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    stop.end_with(parent)


def _encode_chunk(
    chunk: list[tuple[Item, int, int]], storage: Storage, measured_share: float
) -> list[Sample | BadImage]:
    return [encode_sample(item, label, index, storage, measured_share) for item, label, index in chunk]
