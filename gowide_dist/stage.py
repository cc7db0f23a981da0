"""The training loop: the one for every objective, device and number of processes."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gowide_dist.checkpoint import load_weights, newest_checkpoint, save_checkpoint, save_weights
from gowide_dist.data.loader import Batch, Loader
from gowide_dist.errors import UserError
from gowide_dist.metrics import MetricsLog, NonFiniteLossError, StepMeter, StreamDigest, mean_over_samples
from gowide_dist.networks import ResNet, Teacher, build_network
from gowide_dist.objectives import build_objective
from gowide_dist.optim import Descent, MovingAverage, Timeline, learning_rate
from gowide_dist.progress import Track, clock
from gowide_dist.recipe import Instance, KlStage, Recipe
from gowide_dist.run import Done, Run, StageDir, fingerprint, sha256
from gowide_dist.stop import Stopped
from gowide_dist.teacher_logits import Answers, Layout, Source, TeacherLogits, stored_logits
from gowide_dist.world import World

DATA_BOUND = 0.3  # share of the time spent waiting for data from which on the user is told


class TrainingError(UserError):
    """Training went wrong in a way that a change of the recipe can mend."""


@dataclass(frozen=True)
class Images:
    """The data of a run, shared by its stages: loaders, and how their pixels become network input."""

    train: Callable[[int], Loader]  # a new one, for a seed
    val: Loader
    num_classes: int
    mean: Tensor  # [3, 1, 1] on the device, of pixels 0 to 255
    std: Tensor

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, H, H] float32 in channels_last, and labels [B], on the device."""
        device = self.mean.device
        pixels = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)  # NHWC in memory: channels_last
        return pixels.float().sub_(self.mean).div_(self.std), batch.labels.to(device, non_blocking=True)


class Examples(NamedTuple):
    """A batch on the device: images [B, 3, H, H], labels [B], and the teacher's answers where they are stored."""

    images: Tensor
    labels: Tensor
    stored: Answers | None

    def chunk(self, parts: int) -> list[Examples]:
        """The batch in equal parts."""
        stored = self.stored.chunk(parts) if self.stored else [None] * parts
        return [
            Examples(*part) for part in zip(self.images.chunk(parts), self.labels.chunk(parts), stored, strict=True)
        ]


@dataclass(frozen=True)
class Workshop:
    """What all stages of a run train with."""

    recipe: Recipe
    run: Run
    world: World
    images: Images
    identities: Mapping[str, Mapping[str, Any]]


def train_stage(instance: Instance, shop: Workshop) -> Done:
    """Train one stage instance to its end, from wherever it stands; a collective of all processes.

    Raises RunError if the folder is another training's or another process is writing it, TrainingError on a loss that
    is no number.
    """
    place = shop.run.stage(instance.key)
    with (
        closing(shop.images.train(instance.data_seed)) as loader,
        place.lock() if shop.world.is_main else nullcontext(),
    ):
        if shop.world.is_main:
            place.claim(shop.identities[instance.key])
        loader.preflight(shop.images.num_classes)
        return _Training(instance, shop, place, loader).run()


def load_trained(instance: Instance, run: Run, num_classes: int) -> ResNet:
    """The finished network of a stage instance, on the CPU."""
    network = build_network(instance.architecture, num_classes)
    load_weights(run.stage(instance.key).model, network)
    return network


class _Training:
    """One stage instance while it trains."""

    def __init__(self, instance: Instance, shop: Workshop, place: StageDir, loader: Loader) -> None:
        self.instance, self.place, self.loader = instance, place, loader
        self.recipe, self.world, self.images = shop.recipe, shop.world, shop.images
        self.fingerprint = fingerprint(shop.identities[instance.key])
        self.parents = {key: fingerprint(shop.identities[key]) for key in instance.parents}
        self.step = 0
        self.stream = StreamDigest()
        self.seconds_before = 0.0
        self.warned_of_data = False
        self.started = self.saved = time.monotonic()

        # Where a stage starts: its own newest checkpoint, else the finished weights of `init`, else scratch.
        torch.manual_seed(instance.seed)
        student = build_network(instance.architecture, shop.images.num_classes)
        if start := instance.init_file or (instance.init and shop.run.stage(instance.init).model):
            load_weights(start, student)
        teacher = self.stored = None
        if isinstance(instance.stage, KlStage) and instance.stage.teacher_logits == "stored":
            self.stored = self._stored_logits(instance.stage, shop)
        elif instance.teacher:
            teacher = self._teacher(shop)
        self.objective = build_objective(instance.stage, self._placed(student), teacher, instance.seed)
        if self.recipe.compile:
            student.compile_blocks()
        if self.recipe.sync_batch_norm:
            self.objective = nn.SyncBatchNorm.convert_sync_batchnorm(self.objective)  # type: ignore[no-untyped-call]
        self.timeline = Timeline(self.loader.steps_per_epoch, instance.stage.epochs, self.objective.num_phases)
        optim = instance.stage.optim
        self.average = MovingAverage(self.objective, optim.ema) if optim and optim.ema else None
        self.checkpoint = newest_checkpoint(place.checkpoints)
        if self.checkpoint:
            self.objective.load_state_dict(self.checkpoint["objective"])
            self.step = self.checkpoint["step"]
            self.seconds_before = self.checkpoint["seconds"]
            self.stream = StreamDigest(self.checkpoint["stream"])
            if self.average:
                self.average.load_state_dict(self.checkpoint["average"])

    def run(self) -> Done:
        """Train the steps that are left, evaluate, write the weights."""
        total = self.timeline.total_steps
        self.track = Track(
            self.instance.key, total, "steps", start=self.step,
            rate_unit="images", per_thing=self.recipe.batch_size, quiet=not self.world.is_main,
        )  # fmt: skip
        self.metrics = MetricsLog(self.place.metrics, self.step) if self.world.is_main else None
        self.meter = StepMeter(self.step)
        with self.track:
            if self.step:
                self.track.line(f"{self.instance.key}  continues at step {self.step:,} of {total:,}")
            for phase in range(self.timeline.num_phases):
                if self.step < self.timeline.phase(phase).stop:
                    self._train_phase(phase)
            results = self._evaluate()
        done = self.world.share(self._finish(results) if self.world.is_main else None)
        assert done is not None
        self.track.line(
            f"{self.instance.key}  done: top-1 {done.top1:.2f} %, top-5 {done.top5:.2f} %, "
            f"{done.epochs} epochs in {clock(done.seconds)}"
        )
        return done

    def _train_phase(self, phase: int) -> None:
        """Train from the current step to the end of `phase`."""
        steps = self.timeline.phase(phase)
        optim, schedule = self.instance.stage.optim, self.instance.stage.schedule
        assert optim is not None, "a stage that trains has an optim"
        self.world.share_buffers(self.objective)  # blocks frozen from now on must answer alike on every process
        self.objective.begin_phase(phase)
        descent = Descent(self.objective, optim, scaled=self.recipe.precision == "fp16")
        if self.checkpoint and self.checkpoint["phase"] == phase:
            descent.load_state_dict(self.checkpoint["descent"])
        self.checkpoint = None
        trained = self.world.wrap(self.objective)
        self._settle_gradient_buckets(trained, self.recipe.batch_size // self.world.size // optim.accumulate)
        self.objective.train()
        for batch in self._batches(steps.stop):
            rate = learning_rate(self.step, steps, self.timeline.steps_per_epoch, optim, schedule)
            parts = batch.chunk(optim.accumulate)
            for index, (images, labels, stored) in enumerate(parts):
                with self.world.gradients_apart(trained, index + 1 < len(parts)):
                    with self._autocast():
                        losses = trained(images, labels, self.step, stored)
                    descent.backward(losses["loss"] / len(parts))
                self.meter.add(losses, index, len(parts))
            descent.step(rate)
            if self.average:
                self.average.update()
            self.step += 1
            self._after_step(phase, rate, descent)

    def _batches(self, stop: int) -> Iterator[Examples]:
        """The data stream from the current step to step `stop`, on the device."""
        steps_per_epoch = self.timeline.steps_per_epoch
        share = self.recipe.batch_size // self.world.size
        while self.step < stop:
            epoch, start = divmod(self.step, steps_per_epoch)
            with closing(self._epoch(epoch, start)) as batches:
                while self.step < min(stop, (epoch + 1) * steps_per_epoch):
                    with self.meter.waiting():
                        batch = next(batches)
                    self.stream.add(self.step, batch.indices)
                    stored = self.stored.train(self._row(self.step), share) if self.stored else None
                    yield self._examples(batch, stored)

    def _epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from its step `start` on, in the resolution of the epoch."""
        ramp, resolution = self.instance.stage.ramp, self.recipe.data.resolution
        return self.loader.batches(epoch, start, ramp.side(epoch, resolution) if ramp else resolution)

    def _row(self, step: int) -> int:
        """Place in the stream of this process's first image of a step."""
        return step * self.recipe.batch_size + self.world.rank * (self.recipe.batch_size // self.world.size)

    def _validation(self) -> Iterator[Examples]:
        """This process's share of the validation images."""
        for batch in self.images.val.batches():
            first, count = int(batch.indices[0]), len(batch.indices)
            yield self._examples(batch, self.stored.val(first, count) if self.stored else None)

    def _examples(self, batch: Batch, stored: Answers | None) -> Examples:
        return Examples(*self.images.to_device(batch), stored.to(self.world.device) if stored else None)

    def _after_step(self, phase: int, rate: float, descent: Descent) -> None:
        """Record, evaluate and save where they are due. All processes come to the same decisions."""
        recipe, step, total = self.recipe, self.step, self.timeline.total_steps
        epoch, rest = divmod(step, self.timeline.steps_per_epoch)
        every_steps = recipe.checkpoints.every_steps
        signum = self.world.stop_vote() if step < total else 0
        save_due = bool(signum) or (every_steps is not None and step % every_steps == 0)
        if not (save_due or rest == 0 or step % recipe.log_every_steps == 0 or step == self.timeline.phase(phase).stop):
            return
        self._record(rate)
        if rest == 0 and epoch % recipe.eval_every_epochs == 0 and step < total:
            self._evaluate()
        if self.world.is_main and step < total:
            every_minutes = recipe.checkpoints.every_minutes
            if save_due or (every_minutes and time.monotonic() - self.saved > 60 * every_minutes):
                self._save(phase, descent)
        if signum:
            self.track.line(f"{self.instance.key}  saved at step {step:,} of {total:,}: told to stop")
            raise Stopped(signum)

    def _record(self, rate: float) -> None:
        """Write the averages since the last record; a collective. Raises TrainingError on a loss that is no number."""
        try:
            values = self.meter.flush(self.world)
        except NonFiniteLossError as error:
            raise self._diverged(int(error.args[0])) from error
        self.stream.collect(self.world)
        values["images_per_s"] = values.pop("steps_per_s") * self.recipe.batch_size
        self.track.update(self.step, f"loss {values['loss']:.4f}")
        if values["data_wait"] > DATA_BOUND and not self.warned_of_data:
            self.warned_of_data = True
            self.track.line(
                f"{self.instance.key}  warning: {values['data_wait']:.0%} of the time is spent waiting for data; "
                "give the processes more CPU threads, or encode smaller images"
            )
        if self.metrics:
            epoch = self.step / self.timeline.steps_per_epoch
            self.metrics.append("train", self.step, {"epoch": epoch, "lr": rate, **values})

    def _evaluate(self) -> dict[str, float]:
        """Means over the validation set of the objective's losses and of the accuracies (in %); a collective."""
        self.objective.eval()
        with self._averaged(), torch.inference_mode(), self._autocast():
            self.world.share_buffers(self.objective)
            results = mean_over_samples(
                (self.objective.evaluate(*examples) for examples in self._validation()), self.world
            )
        self.objective.train()
        results = {name: 100 * value if name in ("top1", "top5") else value for name, value in results.items()}
        if self.metrics:
            self.metrics.append("val", self.step, {"epoch": self.step / self.timeline.steps_per_epoch, **results})
        return results

    def _save(self, phase: int, descent: Descent) -> None:
        if not all(parameter.isfinite().all() for parameter in self.objective.parameters()):
            raise self._diverged(self.step)
        state = {
            "objective": self.objective.state_dict(),
            "descent": descent.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "phase": phase,
            "step": self.step,
            "seconds": self._seconds(),
            "stream": str(self.stream),
        }
        about = {"stage": self.instance.key, "fingerprint": self.fingerprint, "world_size": self.world.size}
        save_checkpoint(self.place.checkpoints, state, step=self.step, about=about, keep=self.recipe.checkpoints.keep)
        self.saved = time.monotonic()

    def _finish(self, results: Mapping[str, float]) -> Done:
        assert self.metrics is not None
        self.metrics.close()
        with self._averaged():
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
            steps=self.step,
            images=self.step * self.recipe.batch_size,
            stream=str(self.stream),
            seconds=self._seconds(),
            world_size=self.world.size,
        )
        self.place.finish(done)
        shutil.rmtree(self.place.checkpoints)  # a finished stage is never continued
        return done

    def _settle_gradient_buckets(self, trained: nn.Module, num_images: int) -> None:
        """Let DDP see one backward pass before the first step, without learning from it.

        After its first backward DDP reorders its buckets, and with them the order in which three or more processes add
        up a gradient: a continued stage would differ in the last bit from one that was never stopped.
        """
        if trained is self.objective:
            return
        self.objective.eval()
        side, device = self.recipe.data.resolution, self.world.device
        images = torch.zeros(num_images, 3, side, side, device=device).to(memory_format=torch.channels_last)
        labels = torch.zeros(num_images, dtype=torch.long, device=device)
        examples = Examples(images, labels, self.stored.train(0, num_images).to(device) if self.stored else None)
        with self._autocast():
            losses = trained(examples.images, examples.labels, 0, examples.stored)
        losses["loss"].backward()
        self.objective.zero_grad()

    def _stored_logits(self, stage: KlStage, shop: Workshop) -> TeacherLogits:
        """The teacher's logits for the stream of this stage; the teacher is loaded only if they are not there yet."""
        identity = shop.identities[self.instance.key]
        temperature = stage.temperature if stage.top_k else 1.0  # all classes serve every temperature
        about = {
            "format": 1,
            **{name: identity[name] for name in ("teacher", "batch_size", "precision", "compile")},
            "data": {**identity["data"], "seed": self.instance.data_seed},
            **stage.model_dump(mode="json", include={"epochs", "ramp", "top_k"}),
            "temperature": temperature,
        }
        layout = Layout(
            stage.epochs,
            self.loader.steps_per_epoch * self.recipe.batch_size,
            self.images.val.num_samples,
            self.images.num_classes,
            stage.top_k,
            temperature,
        )
        teacher = functools.cache(lambda: self._teacher(shop))

        def ask(batches: Iterator[Batch]) -> Iterator[Tensor]:
            for batch in batches:
                with self._autocast():
                    logits = teacher().logits(self.images.to_device(batch)[0])
                yield logits

        source = Source(lambda epoch: ask(self._epoch(epoch)), lambda: ask(self.images.val.batches()))
        return stored_logits(shop.run.teacher_logits, about, layout, source, self.world, self.instance.key)

    def _teacher(self, shop: Workshop) -> Teacher:
        assert self.instance.teacher
        wide = load_trained(shop.recipe.instances[self.instance.teacher], shop.run, shop.images.num_classes)
        return Teacher(self._placed(wide), compiled=self.recipe.compile)

    def _autocast(self) -> torch.autocast:
        dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.recipe.precision]
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied() if self.average else nullcontext()

    def _placed(self, network: ResNet) -> ResNet:
        return network.to(self.world.device).to(memory_format=torch.channels_last)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _diverged(self, step: int) -> TrainingError:
        stage = self.instance.stage
        assert stage.optim is not None
        phases = (self.timeline.phase(phase) for phase in range(self.timeline.num_phases))
        steps = next(steps for steps in phases if step - 1 in steps)
        rate = learning_rate(step - 1, steps, self.timeline.steps_per_epoch, stage.optim, stage.schedule)
        saved = sorted(self.place.checkpoints.glob("step-*.pt"))
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was due before"
        return TrainingError(
            f"{self.instance.key}: the loss is not finite at step {step:,} (learning rate {rate:g}); "
            f"lower stages.{self.instance.stage_name}.optim.lr or lengthen its warm-up; {kept}"
        )
