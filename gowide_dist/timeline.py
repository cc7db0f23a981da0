"""The units of training, converted once: global and local batches, steps, epochs and phases. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batching:
    """A global batch and the process that takes its part of it: the one place where global becomes local.

    Images are ordered by step, then by rank: a process's part of a step's batch is contiguous in the epoch's order.
    """

    global_batch: int  # images of all processes in a step
    num_processes: int = 1
    rank: int = 0
    accumulate: int = 1  # passes in which a process takes its part

    @property
    def local_batch(self) -> int:
        """Images of one process in a step."""
        return self.global_batch // self.num_processes

    @property
    def micro_batch(self) -> int:
        """Images that a process takes in one pass."""
        return self.local_batch // self.accumulate

    def local_rows(self, step: int) -> range:
        """The places of this process's images of step `step`, counted from step 0 over all processes."""
        start = step * self.global_batch + self.rank * self.local_batch
        return range(start, start + self.local_batch)


@dataclass(frozen=True)
class Timeline:
    """The steps of a stage: `epochs` of `steps_per_epoch`, cut into phases as equal as whole steps allow."""

    batching: Batching
    steps_per_epoch: int
    epochs: int
    num_phases: int = 1

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.steps_per_epoch * self.epochs

    def phase(self, index: int) -> range:
        """The steps of phase `index`."""
        total = self.total_steps
        return range(total * index // self.num_phases, total * (index + 1) // self.num_phases)

    def phase_of(self, step: int) -> int:
        """The phase that step `step` (from 0) belongs to."""
        return next(index for index in range(self.num_phases) if step in self.phase(index))

    def epoch(self, step: int) -> float:
        """Epochs that are over after `step` steps."""
        return step / self.steps_per_epoch

    def images(self, step: int) -> int:
        """Images that all processes have trained on after `step` steps."""
        return step * self.batching.global_batch
