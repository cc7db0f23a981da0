"""What only a finished network tells: latency, agreement with its teacher, dead channels."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

Images = TypeVar("Images")  # a Tensor, or a NumPy array for a runtime that takes these

WARM_UPS = 2
PASSES = range(3, 51)


def latency_ms(forward: Callable[[Images], object], images: Images, seconds: float = 1.0) -> float:
    """Median ms of `forward(images)` after warm-up, over 3 to 50 calls that take about `seconds` together.

    A CUDA device is waited for. The caller sets eval and inference mode, threads, memory format.
    """
    import torch

    def call_s() -> float:
        start = time.perf_counter()
        forward(images)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(WARM_UPS):
        call_s()
    calls = [call_s()]
    while len(calls) < PASSES.start or (sum(calls) < seconds and len(calls) < PASSES.stop - 1):
        calls.append(call_s())
    return 1000 * median(calls)
