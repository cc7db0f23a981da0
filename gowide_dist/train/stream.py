"""The data stream of a stage: batches on the device with the teacher's stored output, what was seen, how fast."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import cast

import torch
from torch import Tensor

from gowide_dist.data.loader import Batch, Loader
from gowide_dist.instances import Instance
from gowide_dist.stages import LogitsStage
from gowide_dist.timeline import Batching, Timeline
from gowide_dist.train.context import TrainBatch, TrainContext, Views
from gowide_dist.train.losses import Targets, balanced_weights
from gowide_dist.train.metrics import StreamDigest, Throughput
from gowide_dist.train.mixing import Mixing, Pairs
from gowide_dist.train.teacher_logits import TeacherLogits, TeacherOutput


class Stream:
    """One process's part of a stage's images, for all students of the stage.

    digest: which samples were seen at which step, and how they were mixed. throughput: steps per second, and the time
    spent waiting for data.
    """

    def __init__(self, loader: Loader, instances: Sequence[Instance], ctx: TrainContext) -> None:
        """Instances: the students; they have the same stage and the same seed of the data."""
        instance, stage = instances[0], instances[0].stage
        self._views = list(dict.fromkeys(each.normalise for each in instances))
        teacher = ctx.recipe.instances[instance.teacher] if instance.teacher else instance
        self._views_with_teacher = list(dict.fromkeys([*self._views, teacher.normalise]))
        self._loader, self._ramp, self._ctx = loader, stage.ramp, ctx
        self._mixing: Mixing | None = None
        if isinstance(stage, LogitsStage) and stage.is_mixed:
            self._mixing = Mixing(stage.mixup, stage.cutmix, instance.data_seed)
        self._batching = Batching(ctx.recipe.batch_size, ctx.world.size, ctx.world.rank)
        self.stored: TeacherLogits | None = None
        self.digest = StreamDigest()
        self.throughput = Throughput()

    @property
    def steps_per_epoch(self) -> int:
        return self._loader.steps_per_epoch

    def class_weights(self) -> Tensor:
        """Weights with which every class counts alike in training: [K], on the device."""
        counts = self._loader.class_counts(self._ctx.data.num_classes)
        return balanced_weights(counts).to(self._ctx.world.device)

    def epoch(self, epoch: int) -> Iterator[Views]:
        """The batches of an epoch as training takes them, without stored outputs. Their samples are not counted."""
        for step, batch in enumerate(self._decoded(epoch), epoch * self.steps_per_epoch):
            yield self._on_device(batch, None, self._pairs(step, batch))

    def _decoded(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The loader's batches of an epoch from its step `start` on, in the resolution of the epoch."""
        resolution = self._ctx.recipe.data.resolution
        return self._loader.batches(epoch, start, self._ramp.side(epoch, resolution) if self._ramp else resolution)

    def train(self, timeline: Timeline, start: int, stop: int) -> Iterator[Views]:
        """The batches of steps `start` to before `stop`, on the device."""
        step = start
        while step < stop:
            epoch, step_of_epoch = divmod(step, timeline.steps_per_epoch)
            with closing(self._decoded(epoch, step_of_epoch)) as batches:
                while step < min(stop, (epoch + 1) * timeline.steps_per_epoch):
                    with self.throughput.waiting():
                        batch = next(batches)
                    pairs, rows = self._pairs(step, batch), timeline.batching.local_rows(step)
                    self.digest.add(step, pairs.seen(batch.indices) if pairs else batch.indices)
                    stored = self.stored.train(rows.start, len(rows)) if self.stored else None
                    yield self._on_device(batch, stored, pairs)
                    step += 1

    def validation(self) -> Iterator[Views]:
        """This process's part of the validation images, on the device."""
        for batch in self._ctx.data.val.batches():
            first, count = int(batch.indices[0]), len(batch.indices)
            yield self._on_device(batch, self.stored.val(first, count) if self.stored else None)

    def blank(self, batching: Batching) -> Views:
        """Black images with labels, in the shape of what a process takes in one pass."""
        side, device, num_images = self._ctx.recipe.data.resolution, self._ctx.world.device, batching.micro_batch
        images = torch.zeros(num_images, 3, side, side, device=device).to(memory_format=torch.channels_last)
        stored = self.stored.train(0, num_images).to(device) if self.stored else None
        batch = TrainBatch(images, torch.zeros(num_images, dtype=torch.long, device=device), stored)
        return dict.fromkeys(self._views_with_teacher, batch)

    def _pairs(self, step: int, batch: Batch) -> Pairs | None:
        return self._mixing.pairs(step, batch.images.shape[1], self._batching) if self._mixing else None

    def _on_device(self, batch: Batch, stored: TeacherOutput | None, pairs: Pairs | None = None) -> Views:
        """The batch in every normalisation that a network of the stage wants; it travels to the device once."""
        pixels, labels = self._ctx.data.to_device(batch)
        stored = stored.to(self._ctx.world.device) if stored else None
        views = {}
        for normalise in self._views if stored else self._views_with_teacher:
            images, targets = self._ctx.data.normalised(pixels, normalise), cast(Targets, labels)
            if pairs:
                images, targets = pairs.mix(images, labels)
            views[normalise] = TrainBatch(images, targets, stored)
        return views
