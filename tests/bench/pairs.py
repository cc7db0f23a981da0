"""Two ways of doing the same, timed in turns: what else the machine does meanwhile slows both alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gowide_dist.progress import Track

_MOST_TURNS = 50


@dataclass(frozen=True)
class Effort:
    """How much to measure: N pairs, in each of which every side works for about this many seconds."""

    pairs: int = 5
    seconds: float = 2.0


@dataclass(frozen=True)
class Figure:
    """The median of the pairs' ratios between their quartiles. what: what is over what."""

    what: str
    target: str
    ratio: float
    low: float
    high: float
    pairs: int
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, what: str, target: str, over: list[float], under: list[float], **details: Any) -> "Figure":
        """From the seconds of both sides, pair by pair: the first over the second."""
        return cls.around(what, target, [a / b for a, b in zip(over, under, strict=True)], **details)

    @classmethod
    def around(cls, what: str, target: str, values: list[float], **details: Any) -> "Figure":
        """From one value of every pair."""
        return cls(what, target, **quartiles(values), pairs=len(values), details=details)

    def as_json(self) -> dict[str, Any]:
        """Details stand beside the rest."""
        values = asdict(self)
        details = values.pop("details")
        return {**values, **details}


def spread(over: list[float], under: list[float]) -> dict[str, float]:
    """Median (`ratio`) and quartiles (`low`, `high`) of the ratios of pairs."""
    return quartiles([a / b for a, b in zip(over, under, strict=True)])


def quartiles(values: list[float]) -> dict[str, float]:
    """Median (`ratio`) and quartiles (`low`, `high`), to four digits."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"ratio": _rounded(middle), "low": _rounded(low), "high": _rounded(high)}


def milliseconds(seconds: list[float]) -> float:
    """The median, to four digits."""
    return _rounded(1000 * statistics.median(seconds))


def clock() -> float:
    """The time in seconds when all that was launched is done, on a GPU too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object]) -> float:
    start = clock()
    work()
    return clock() - start


def in_turns(name: str, sides: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    """Seconds that a turn of each side took, averaged over each pair's turns, after two turns to warm up.

    The sides go round turn by turn, so that a pair's sides met the same machine.
    """
    for work in sides.values():
        work()
    slowest = max(seconds_of(work) for work in sides.values())
    turns = min(_MOST_TURNS, max(1, round(effort.seconds / slowest)))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    with Track(name, effort.pairs, "pairs", stderr=True) as track:
        for pair in range(effort.pairs):
            for taken in seconds.values():
                taken.append(0.0)
            for turn in range(turns):
                for side in list(sides)[:: 1 if turn % 2 == 0 else -1]:
                    seconds[side][-1] += seconds_of(sides[side]) / turns
            track.update(pair + 1)
    return seconds


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
