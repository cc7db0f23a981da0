"""The order of samples, and every random number of the data stream: pure functions of the seed and the position.

The generator is SplitMix64 (Steele, Lea and Flood 2014) read by position: draw k of key s is mix(s + k * GAMMA). It has
no state, so any process or thread can compute any draw, and it never changes with a library's version.
"""

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)

ORDER_STREAM, AUGMENT_STREAM, PAGE_STREAM, MIXING_STREAM = range(4)


def draw(key: Any, position: Any) -> Any:
    """Draw number `position` of `key`: uniform 64-bit integers. Both uint64: arrays, or scalars once compiled."""
    x = key + position * GAMMA
    x = (x ^ (x >> _SHIFTS[0])) * _MULTIPLIER_1
    x = (x ^ (x >> _SHIFTS[1])) * _MULTIPLIER_2
    return x ^ (x >> _SHIFTS[2])


def epoch_key(seed: int, epoch: int, stream: int) -> np.uint64:
    """The key of one random stream (ORDER_STREAM, AUGMENT_STREAM, PAGE_STREAM) of an epoch."""
    key = np.zeros(1, np.uint64)
    for part in (seed, epoch, stream):
        key = draw(key, np.array([part + 1], np.uint64))
    return np.uint64(key[0])


def draws(key: np.uint64, num: int) -> NDArray[np.uint64]:
    """The first draws of `key`: [num], all different."""
    return np.asarray(draw(key, np.arange(num, dtype=np.uint64)))


def random_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of the samples, the same for every process: [num_samples], sorted by their draws."""
    return np.argsort(draws(epoch_key(seed, epoch, ORDER_STREAM), num_samples))


def quasi_random_order(
    pages: NDArray[np.int64], window_pages: int, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A permutation of the samples that goes through the file a window of random pages at a time, for slow disks.

    pages: int64 [N], the page of each sample. Returns the order [N], and the distinct pages in the order of their
    first use.
    """
    key = epoch_key(seed, epoch, PAGE_STREAM)
    distinct, page_of_sample = np.unique(pages, return_inverse=True)
    shuffled = np.argsort(draw(key, distinct.astype(np.uint64)))
    window = np.empty(len(distinct), np.int64)
    window[shuffled] = np.arange(len(distinct)) // window_pages
    by_draw = draws(epoch_key(seed, epoch, ORDER_STREAM), len(pages))
    return np.lexsort((by_draw, window[page_of_sample])), distinct[shuffled]


def read_ahead_schedule(
    pages: NDArray[np.int64], window_pages: int, steps_per_epoch: int, start: int
) -> deque[tuple[int, int]]:
    """The pages of a quasi-random epoch as (step, page), in the order of these steps at which to read them ahead.

    pages: in the order of their first use. Each is read one window before it is needed, evenly over the epoch. Pages
    that only steps before `start` need are left out.
    """
    rank = np.arange(len(pages))
    steps = (rank - window_pages) * steps_per_epoch // len(pages)
    window_end = (rank // window_pages + 1) * window_pages
    needed = window_end * steps_per_epoch > start * len(pages)
    return deque(zip(steps[needed].tolist(), pages[needed].tolist(), strict=True))


def validation_part(num_samples: int, rank: int, num_processes: int) -> NDArray[np.int64]:
    """The samples that process `rank` evaluates, int64: contiguous parts, each sample in exactly one of them."""
    return np.arange(num_samples * rank // num_processes, num_samples * (rank + 1) // num_processes)
