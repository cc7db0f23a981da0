"""One student of a stage: what it learns, records, saves and leaves behind. The loop in `stage` says when."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gowide_dist.errors import UserError
from gowide_dist.files import sha256
from gowide_dist.identity import fingerprint
from gowide_dist.networks.weights import save_weights
from gowide_dist.recipe import Instance, Recipe
from gowide_dist.run import Done, StageDir
from gowide_dist.train.checkpoint import Background, load_checkpoint, save_checkpoint, snapshot
from gowide_dist.train.metrics import MetricsLog, NonFiniteLossError, StepMeter, StreamDigest
from gowide_dist.train.objectives import Objective
from gowide_dist.train.optim import MovingAverage, Optimizer, Timeline, learning_rate
from gowide_dist.train.teacher_logits import TeacherOutput
from gowide_dist.world import World


class TrainingError(UserError):
    """Training went wrong in a way that a change of the recipe can mend."""


class Examples(NamedTuple):
    """A batch on the device: images [B, 3, H, H], labels [B], and the teacher's answers where they are stored."""

    images: Tensor
    labels: Tensor
    stored: TeacherOutput | None

    def chunk(self, parts: int) -> list[Examples]:
        """The batch in equal parts."""
        stored = self.stored.chunk(parts) if self.stored else [None] * parts
        return [
            Examples(*part) for part in zip(self.images.chunk(parts), self.labels.chunk(parts), stored, strict=True)
        ]


class Student:
    """An instance while it trains. `seconds`: of the steps so far, over all restarts."""

    def __init__(
        self,
        instance: Instance,
        objective: Objective,
        place: StageDir,
        identities: Mapping[str, Mapping[str, Any]],
        recipe: Recipe,
        world: World,
        steps_per_epoch: int,
        writing: Background,
    ) -> None:
        self.instance, self.objective, self.place = instance, objective, place
        self.recipe, self.world, self.writing = recipe, world, writing
        self.fingerprint = fingerprint(identities[instance.key])
        self.parents = {key: fingerprint(identities[key]) for key in instance.parents}
        self.timeline = Timeline(steps_per_epoch, instance.stage.epochs, objective.num_phases)
        optim = instance.stage.optim
        self.average = MovingAverage(objective, optim.ema) if optim and optim.ema else None
        self.checkpoint: dict[str, Any] | None = None
        self.seconds = 0.0

    def begin(self, step: int) -> StreamDigest:
        """Be as after `step` steps, from this student's checkpoint; the digest of what was seen until then."""
        self.metrics = MetricsLog(self.place.metrics, step) if self.world.is_main else None
        self.meter = StepMeter(step)
        if not step:
            return StreamDigest()
        self.checkpoint = load_checkpoint(self.place.checkpoints, step)
        self.objective.load_state_dict(self.checkpoint["objective"])
        self.seconds = self.checkpoint["seconds"]
        if self.average:
            self.average.load_state_dict(self.checkpoint["average"])
        return StreamDigest(self.checkpoint["stream"])

    def begin_phase(self, phase: int, blank: Examples) -> None:
        """Train what phase `phase` trains from now on. blank: a batch of the shape of those to come."""
        optim = self.instance.stage.optim
        assert optim is not None, "a stage that trains has an optim"
        self.world.broadcast_buffers(self.objective)  # blocks frozen from now on must answer alike on every process
        self.objective.begin_phase(phase)
        self.phase = phase
        self.optimizer = Optimizer(self.objective, optim, scaled=self.recipe.precision == "fp16")
        if self.checkpoint and self.checkpoint["phase"] == phase:
            self.optimizer.load_state_dict(self.checkpoint["optimizer"])
        self.checkpoint = None
        self.trained = self.world.wrap(self.objective)
        self._settle_gradient_buckets(blank)
        self.objective.train()

    def forward_backward(self, examples: Examples, step: int, part: int, num_parts: int) -> None:
        """Add the gradient of one of the equal parts of the batch of a step."""
        images, labels, stored = examples
        with self.world.no_sync(self.trained, part + 1 < num_parts):
            with self.autocast():
                losses = self.trained(images, labels, step, stored)
            self.optimizer.backward(losses["loss"] / num_parts if num_parts > 1 else losses["loss"])
        self.meter.add(losses, num_parts)

    def step(self, rate: float) -> None:
        """Step along the gradient at this learning rate."""
        self.optimizer.step(rate)
        if self.average:
            self.average.update()

    def record(self, step: int, rate: float) -> dict[str, float]:
        """Write the averages since the last record; a collective. Raises TrainingError on a loss that is no number."""
        try:
            values = self.meter.flush(self.world)
        except NonFiniteLossError as error:
            newest = self.world.broadcast(self._newest() if self.world.is_main else None)
            raise self._diverged(int(error.args[0]), newest) from error
        values["comm_wait"] = min(
            1 - values["data_wait"], self.world.communication_s(self.trained) * values["steps_per_s"]
        )
        values["images_per_s"] = values.pop("steps_per_s") * self.recipe.batch_size
        if self.metrics:
            self.metrics.append("train", step, {"epoch": step / self.timeline.steps_per_epoch, "lr": rate, **values})
        return values

    def record_evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Write what an evaluation has found."""
        if self.metrics:
            self.metrics.append("val", step, {"epoch": step / self.timeline.steps_per_epoch, **results})

    def save(self, step: int, stream: StreamDigest) -> None:
        """Copy the whole training state, to be written in the background; the main process's business."""
        if not all(parameter.isfinite().all() for parameter in self.objective.parameters()):
            raise self._diverged(step, self._newest())
        state = {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "phase": self.phase,
            "step": step,
            "seconds": self.seconds,
            "stream": str(stream),
        }
        metadata = {"stage": self.instance.key, "fingerprint": self.fingerprint, "world_size": self.world.size}
        keep = self.recipe.checkpoints.keep
        self.writing(
            partial(save_checkpoint, self.place.checkpoints, snapshot(state), step=step, metadata=metadata, keep=keep)
        )

    def finish(self, step: int, results: Mapping[str, float], stream: StreamDigest) -> Done:
        """Write the finished weights and say so; the main process's business."""
        assert self.metrics is not None
        self.metrics.close()
        with self.averaged():
            save_weights(self.place.model, self.objective.finished())
        done = Done(
            stage=self.instance.stage_name,
            network=self.instance.network_name,
            fingerprint=self.fingerprint,
            parents=self.parents,
            model_sha256=sha256(self.place.model),
            top1=results["top1"],
            top5=results["top5"],
            epochs=self.instance.stage.epochs,
            steps=step,
            images=step * self.recipe.batch_size,
            stream=str(stream),
            seconds=self.seconds,
            world_size=self.world.size,
        )
        self.place.finish(done)
        shutil.rmtree(self.place.checkpoints)  # a finished stage is never continued
        return done

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are their moving average, if the recipe asks for one."""
        return self.average.applied() if self.average else nullcontext()

    def autocast(self) -> torch.autocast:
        """Inside, convolutions compute in the precision of the recipe."""
        return autocast(self.recipe, self.world)

    def _settle_gradient_buckets(self, blank: Examples) -> None:
        """Let DDP see one backward pass before the first step, without learning from it.

        After its first backward DDP reorders its buckets, and with them the order in which three or more processes add
        up a gradient: a continued stage would differ in the last bit from one that was never stopped.
        """
        if self.trained is self.objective:
            return
        self.objective.eval()
        with self.autocast():
            losses = self.trained(blank.images, blank.labels, 0, blank.stored)
        losses["loss"].backward()
        self.objective.zero_grad()

    def _newest(self) -> Path | None:
        """The newest checkpoint, those that are being written included."""
        self.writing.wait()
        return max(self.place.checkpoints.glob("step-*.pt"), default=None)

    def _diverged(self, step: int, newest: Path | None) -> TrainingError:
        stage = self.instance.stage
        assert stage.optim is not None
        phases = (self.timeline.phase(phase) for phase in range(self.timeline.num_phases))
        steps = next(steps for steps in phases if step - 1 in steps)
        rate = learning_rate(step - 1, steps, self.timeline.steps_per_epoch, stage.optim, stage.schedule)
        kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint was due before"
        return TrainingError(
            f"{self.instance.key}: the loss is not finite at step {step:,} (learning rate {rate:g}); "
            f"lower stages.{self.instance.stage_name}.optim.lr or lengthen its warm-up; {kept}"
        )


def autocast(recipe: Recipe, world: World) -> torch.autocast:
    """Inside, convolutions compute in the precision of the recipe."""
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
    return torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
