"""One student of a stage: its training step, and what it records, saves and leaves behind. `loop` decides when."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gowide_dist.data.preprocessing import Preprocessing, Quantisation
from gowide_dist.errors import UserError
from gowide_dist.files import sha256
from gowide_dist.instances import Instance
from gowide_dist.networks.quantised import Quantised
from gowide_dist.networks.weights import save_weights
from gowide_dist.run import Done
from gowide_dist.timeline import Timeline
from gowide_dist.train.checkpoint import save_checkpoint, snapshot
from gowide_dist.train.context import TrainBatch, TrainContext, Views
from gowide_dist.train.metrics import LossMeter, MetricsLog
from gowide_dist.train.objectives import Objective
from gowide_dist.train.optim import MovingAverage, Optimizer, average_decay, learning_rate
from gowide_dist.train.writing import Writer


class TrainingError(UserError):
    """Training went wrong in a way that a change of the recipe can fix."""


class Student:
    """An instance while it trains. seconds: of training so far, over all restarts."""

    def __init__(
        self, instance: Instance, objective: Objective, ctx: TrainContext, timeline: Timeline, writer: Writer
    ) -> None:
        self.instance, self.objective, self.ctx = instance, objective, ctx
        self.timeline, self.writer = timeline, writer
        self.normalise = instance.normalise
        self.stage_dir = ctx.run.stage(instance.key)
        self.fingerprint = ctx.fingerprint(instance.key)
        optim = instance.stage.optim
        self.average = MovingAverage(objective) if optim and optim.ema else None

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        """Start at `step`, from a checkpoint's state if there is one. Its optimizer is loaded when the phase begins."""
        self.restored = state
        self.seconds = state["seconds"] if state else 0.0
        if state:
            self.objective.load_state_dict(state["objective"])
        if state and self.average:
            self.average.load_state_dict(state["average"])
        self.metrics = MetricsLog(self.stage_dir.metrics, step) if self.ctx.world.is_main else None
        self.losses = LossMeter(step)

    def begin_phase(self, phase: int, blank: Views) -> None:
        """Train what phase `phase` trains from now on. blank: a batch of the shape of those to come."""
        optim = self.instance.stage.optim
        assert optim is not None, "a stage that trains has an optim"
        self.objective.begin_phase(phase)
        self.phase = phase
        self.optimizer = Optimizer(self.objective, optim, scaled=self.ctx.recipe.precision == "fp16")
        if self.restored and self.restored["phase"] == phase:
            self.optimizer.load_state_dict(self.restored["optimizer"])
        self.restored = None
        # Gives every process rank 0's statistics too: blocks that are frozen from now on must answer alike everywhere.
        self.wrapped = self.ctx.world.wrap(self.objective)
        self._settle_gradient_buckets(blank[self.normalise])
        self.objective.train()

    def forward_backward(self, batch: Views, step: int, index: int = 0, num_passes: int = 1) -> None:
        """Add the gradient of pass `index` of the `num_passes` equal ones that the batch of `step` is taken in."""
        _seed(self.instance.seed, step, index, self.ctx.world.rank)
        with self.ctx.world.no_sync(self.wrapped, skip=index + 1 < num_passes):
            with self.ctx.autocast():
                losses = self.wrapped(*batch[self.normalise])
            self.optimizer.backward(losses["loss"] / num_passes if num_passes > 1 else losses["loss"])
        self.losses.add(losses, num_passes)

    def update(self, step: int, lr: float) -> None:
        """The optimizer's step `step` with learning rate `lr`, along the gradient of all passes."""
        self.optimizer.step(lr)
        optim = self.instance.stage.optim
        if self.average and optim and optim.ema:
            self.average.update(average_decay(step, self.timeline, optim.ema))

    def mean_losses(self) -> dict[str, float]:
        """Averages since the last call; a collective. Raises TrainingError on a non-finite loss, on every process."""
        means, bad_step = self.losses.flush(self.ctx.world)
        if bad_step == 1:  # no learning rate has acted yet
            raise TrainingError(
                f"{self.instance.key}: the loss is not finite at step 1, before anything is learnt; look at the "
                f"weights that stages.{self.instance.stage_name} starts from, at its loss and at precision"
            )
        if bad_step is not None:
            newest = self.ctx.world.on_main(self._newest_checkpoint)
            raise _diverged(self.instance, self.timeline, bad_step, newest)
        return means

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write a line of metrics, of `kind` train or val; rank 0 only."""
        assert self.metrics is not None
        self.metrics.append(kind, step, {"epoch": self.timeline.epoch(step), **values})

    def save(self, step: int, stream: str) -> None:
        """Copy the whole training state, to be written in the background; rank 0 only.

        Raises TrainingError if a parameter is not finite: the last good checkpoint must stay.
        """
        if not all(parameter.isfinite().all() for parameter in self.objective.parameters()):
            raise _diverged(self.instance, self.timeline, step, self._newest_checkpoint())
        state = {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "phase": self.phase,
            "step": step,
            "seconds": self.seconds,
            "stream": stream,
        }
        metadata = {"stage": self.instance.key, "fingerprint": self.fingerprint, "world_size": self.ctx.world.size}
        folder, keep = self.stage_dir.checkpoints, self.ctx.recipe.checkpoints.keep
        self.writer.write_later(
            partial(save_checkpoint, folder, snapshot(state), step=step, metadata=metadata, keep=keep)
        )

    def finish(self, step: int, results: Mapping[str, float], stream: str) -> Done:
        """Write the finished weights, then the marker that they are finished; rank 0 only."""
        assert self.metrics is not None
        self.metrics.close()
        data = self.ctx.recipe.data, self.ctx.data.info, self.normalise
        with self.averaged():
            network = self.objective.finished()
            rounding = Quantisation(**network.rounding) if isinstance(network, Quantised) else None
            save_weights(self.stage_dir.model, network, Preprocessing.of(*data, rounding).metadata)
        done = Done(
            stage=self.instance.stage_name,
            network=self.instance.network_name,
            fingerprint=self.fingerprint,
            parents={key: self.ctx.fingerprint(key) for key in self.instance.parents},
            model_sha256=sha256(self.stage_dir.model),
            top1=results["top1"],
            top5=results["top5"],
            balanced_top1=results["balanced_top1"],
            epochs=self.instance.stage.epochs,
            steps=step,
            images=self.timeline.images(step),
            stream=stream,
            seconds=self.seconds,
            world_size=self.ctx.world.size,
        )
        self.stage_dir.finish(done)
        shutil.rmtree(self.stage_dir.checkpoints, ignore_errors=True)  # a finished stage is never continued
        return done

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are their moving average, if the recipe asks for one."""
        return self.average.applied() if self.average else nullcontext()

    def _settle_gradient_buckets(self, blank: TrainBatch) -> None:
        """Let DDP see one backward pass before the first step, without learning from it.

        After its first backward DDP reorders its buckets, and with them the order in which three or more processes add
        up a gradient: a continued stage would differ in the last bit from one that was never stopped. On GPUs equal
        bits are not promised, and the pass is saved.
        """
        if self.wrapped is self.objective or blank.images.device.type != "cpu":
            return
        self.objective.eval()
        with self.ctx.autocast():
            losses = self.wrapped(*blank)
        losses["loss"].backward()
        self.objective.zero_grad()

    def _newest_checkpoint(self) -> Path | None:
        """The newest checkpoint, those that are being written included."""
        self.writer.wait()
        return max(self.stage_dir.checkpoints.glob("step-*.pt"), default=None)


def _diverged(instance: Instance, timeline: Timeline, step: int, newest: Path | None) -> TrainingError:
    """The error for a loss that is not finite at `step`, counted from 1. newest: the last checkpoint."""
    lr = learning_rate(step - 1, timeline, instance.stage)
    kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint has been written yet"
    return TrainingError(
        f"{instance.key}: the loss is not finite at step {step:,} (learning rate {lr:g}); "
        f"lower stages.{instance.stage_name}.optim.lr or lengthen its warm-up; {kept}"
    )


def _seed(*of: int) -> None:
    """Make what networks draw at random, as dropout does, a function of these: the same after a restart."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(str(of).encode()).digest()[:8]))
