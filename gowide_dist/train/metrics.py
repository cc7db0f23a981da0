"""What is measured while training: averages over steps, accuracies over a dataset, and where they are written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gowide_dist.data.order import draw
from gowide_dist.files import write_atomically
from gowide_dist.run import read_metrics
from gowide_dist.world import World


class LossMeter:
    """Losses of the steps since the last flush. They stay on the device: no step waits for them."""

    def __init__(self, step: int) -> None:
        self._first_step = step
        self._losses: list[dict[str, Tensor]] = []  # of every pass of every step
        self._num_passes = 1

    def add(self, losses: dict[str, Tensor], num_passes: int = 1) -> None:
        """Count the losses, scalars by name, of one of the equal passes that the batch of a step is taken in."""
        self._num_passes = num_passes
        self._losses.append({name: loss.detach() for name, loss in losses.items()})

    def flush(self, world: World) -> tuple[dict[str, float], int | None]:
        """Averages over processes and the steps since the last flush, and the first step (from 1) with a loss that is
        not finite, if there is one: the same on every process. A collective.
        """
        names = list(self._losses[0])
        passes = torch.stack([losses[name] for losses in self._losses for name in names])
        steps = passes.view(-1, self._num_passes, len(names)).mean(dim=1)
        losses = (world.sum(steps) / world.size).cpu()
        bad = (~losses.isfinite()).any(dim=1).nonzero()
        bad_step = self._first_step + int(bad[0]) + 1 if len(bad) else None
        self._first_step += len(losses)
        self._losses.clear()
        return dict(zip(names, losses.double().mean(dim=0).tolist(), strict=True)), bad_step


class Throughput:
    """Steps per second, and the part of the time that is spent waiting for data, since the last flush."""

    def __init__(self) -> None:
        self._num_steps, self._waited_s = 0, 0.0
        self._started: float | None = None  # with the first step, so that an evaluation before it does not count

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the batch of a step."""
        asked = time.perf_counter()
        self._started = self._started or asked
        yield
        self._num_steps += 1
        self._waited_s += time.perf_counter() - asked

    def flush(self) -> tuple[float, float]:
        """Steps per second, and the part of the time spent waiting, from 0 to 1; of this process."""
        assert self._started is not None, "a record comes after a step"
        seconds = time.perf_counter() - self._started
        result = self._num_steps / seconds, self._waited_s / seconds
        self._num_steps, self._waited_s, self._started = 0, 0.0, None
        return result


class StreamDigest:
    """Which samples were seen at which step, in one number: equal for any number of processes, restarts or nodes.

    The sum, modulo 2^64, of a hash of (step, sample) over all that was seen.
    """

    def __init__(self, hex_digest: str = "0") -> None:
        self._total = int(hex_digest, 16)
        self._steps: list[int] = []  # of this process, since the last collection: hashed together, which is cheaper
        self._samples: list[Tensor] = []

    def add(self, step: int, indices: Tensor) -> None:
        """Count this process's samples of a step: [B] int64, kept until the next collection."""
        self._steps.append(step)
        self._samples.append(indices)

    def collect(self, world: World) -> None:
        """Add up what all processes have counted; a collective."""
        steps = np.repeat(np.array(self._steps, np.uint64), [len(samples) for samples in self._samples])
        samples = torch.cat([torch.empty(0, dtype=torch.int64), *self._samples]).numpy().astype(np.uint64)
        hashes = draw(draw(np.uint64(0), steps), samples)
        own = torch.from_numpy(np.add.reduce(hashes, keepdims=True).view(np.int64))
        self._total = (self._total + int(world.sum(own.to(world.device)))) % 2**64
        self._steps.clear()
        self._samples.clear()

    def __str__(self) -> str:
        return f"{self._total:016x}"


class MetricsLog:
    """A stage's `metrics.jsonl`, and the same in TensorBoard's event files: train/loss, val/top1 ... over steps.

    Opened at a step, it drops the lines after it: they are of a continuation that was lost. `seconds` of a line count
    the training up to it, over restarts and without what was lost at them. The event files are written anew from the
    lines that are kept, because not all their readers know restarts: `wandb sync` mixes the pieces up.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        seconds = kept[-1].get("seconds", 0.0) if kept else 0.0
        self._started, self._started_at = time.monotonic() - seconds, time.time() - seconds
        self._file = path.open("a")
        folder = path.with_name("tensorboard")
        for old in folder.glob("events.out.*"):
            os.truncate(old, 0)  # not deleted: a TensorBoard that reads the file would wait for it for ever
        self._board = SummaryWriter(folder, purge_step=0, flush_secs=10)  # and it forgets the points that it has
        for line in kept:
            self._add_scalars(line)

    def append(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line of `kind` train or val."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        line = {"kind": kind, "step": step, **rounded, "seconds": round(time.monotonic() - self._started, 3)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._add_scalars(line)

    def _add_scalars(self, line: dict[str, Any]) -> None:
        walltime = self._started_at + line.get("seconds", 0.0)
        for name in line.keys() - {"kind", "step", "seconds"}:
            self._board.add_scalar(f"{line['kind']}/{name}", line[name], line["step"], walltime=walltime)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def mean_over_samples(batches: Iterable[Sequence[dict[str, Tensor]]], world: World) -> list[dict[str, float]]:
    """Each student's means over all samples of all processes; a collective.

    batches: of every batch, for each student, values of each sample by name, [B] each.
    """
    names: list[list[str]] = []
    sums: Tensor | None = None
    for students in batches:
        names = [list(values) for values in students]
        stacked = torch.stack([rows for values in students for rows in values.values()]).double()  # [all names, B]
        batch = torch.cat([stacked.sum(dim=1), stacked.new_tensor([stacked.shape[1]])])
        sums = batch if sums is None else sums + batch
    assert sums is not None, "every process evaluates at least one batch"
    *totals, count = world.sum(sums).tolist()
    means = (total / count for total in totals)
    return [{name: next(means) for name in own} for own in names]
