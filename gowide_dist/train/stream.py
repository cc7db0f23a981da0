"""The data stream of a stage: batches on the device with the teacher's stored output, what was seen, how fast."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

import torch

from gowide_dist.data.loader import Batch, Loader
from gowide_dist.stages import Ramp
from gowide_dist.timeline import Batching, Timeline
from gowide_dist.train.context import TrainBatch, TrainContext
from gowide_dist.train.metrics import StreamDigest, Throughput
from gowide_dist.train.teacher_logits import TeacherLogits, TeacherOutput


class Stream:
    """One process's part of a stage's images, for all students of the stage.

    digest: which samples were seen at which step. throughput: steps per second, and the time spent waiting for data.
    """

    def __init__(self, loader: Loader, ramp: Ramp | None, ctx: TrainContext) -> None:
        self._loader, self._ramp, self._ctx = loader, ramp, ctx
        self.stored: TeacherLogits | None = None
        self.digest = StreamDigest()
        self.throughput = Throughput()

    @property
    def steps_per_epoch(self) -> int:
        return self._loader.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The loader's batches of an epoch from its step `start` on, in the resolution of the epoch."""
        resolution = self._ctx.recipe.data.resolution
        return self._loader.batches(epoch, start, self._ramp.side(epoch, resolution) if self._ramp else resolution)

    def train(self, timeline: Timeline, start: int, stop: int) -> Iterator[TrainBatch]:
        """The batches of steps `start` to before `stop`, on the device."""
        step = start
        while step < stop:
            epoch, step_of_epoch = divmod(step, timeline.steps_per_epoch)
            with closing(self.epoch(epoch, step_of_epoch)) as batches:
                while step < min(stop, (epoch + 1) * timeline.steps_per_epoch):
                    with self.throughput.waiting():
                        batch = next(batches)
                    self.digest.add(step, batch.indices)
                    rows = timeline.batching.local_rows(step)
                    yield self._on_device(batch, self.stored.train(rows.start, len(rows)) if self.stored else None)
                    step += 1

    def validation(self) -> Iterator[TrainBatch]:
        """This process's part of the validation images, on the device."""
        for batch in self._ctx.data.val.batches():
            first, count = int(batch.indices[0]), len(batch.indices)
            yield self._on_device(batch, self.stored.val(first, count) if self.stored else None)

    def blank(self, batching: Batching) -> TrainBatch:
        """Black images with labels, in the shape of what a process takes in one pass."""
        side, device, num_images = self._ctx.recipe.data.resolution, self._ctx.world.device, batching.micro_batch
        images = torch.zeros(num_images, 3, side, side, device=device).to(memory_format=torch.channels_last)
        stored = self.stored.train(0, num_images).to(device) if self.stored else None
        return TrainBatch(images, torch.zeros(num_images, dtype=torch.long, device=device), stored)

    def _on_device(self, batch: Batch, stored: TeacherOutput | None) -> TrainBatch:
        return TrainBatch(*self._ctx.data.to_device(batch), stored.to(self._ctx.world.device) if stored else None)
