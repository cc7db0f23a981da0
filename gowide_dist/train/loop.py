"""The training loop: the one for every objective, device and number of processes, and for several students at once."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gowide_dist.data.loader import Batch, Loader
from gowide_dist.identity import fingerprint
from gowide_dist.networks.resnet import ResNet, build_network, take_over
from gowide_dist.networks.teacher import Teacher
from gowide_dist.networks.weights import load_weights
from gowide_dist.progress import Track, clock
from gowide_dist.recipe import Instance, KlStage, Recipe, TaughtStage
from gowide_dist.run import Done, Run
from gowide_dist.stop import Stopped
from gowide_dist.train.checkpoint import Background, whole_checkpoints
from gowide_dist.train.metrics import mean_over_samples
from gowide_dist.train.objectives import build_objective
from gowide_dist.train.optim import learning_rate
from gowide_dist.train.student import Examples, Student, TrainingError, autocast
from gowide_dist.train.teacher_logits import Layout, TeacherLogits, TeacherOutput, stored_logits
from gowide_dist.world import World, to_device

DATA_BOUND = 0.3  # share of the time spent waiting for data from which on the user is told


@dataclass(frozen=True)
class Images:
    """The data of a run, shared by its stages: loaders, and how their pixels become network input."""

    train: Callable[[int], Loader]  # a new one, for a seed
    val: Loader
    num_classes: int
    mean: Tensor  # [3] on the device, of pixels 0 to 255
    std: Tensor
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, H, H] float32 in channels_last, and labels [B], on the device."""
        device = self.mean.device
        pixels = to_device(batch.images, device)
        mean, std = self._over_a_row(pixels.shape[2])
        images = pixels.flatten(2).float().sub_(mean).div_(std).view(pixels.shape)
        return images.permute(0, 3, 1, 2), to_device(batch.labels, device)  # NHWC in memory: channels_last

    def _over_a_row(self, width: int) -> tuple[Tensor, Tensor]:
        """Mean and deviation [3 * width] for a row of pixels: CPUs take rows three times as fast as three channels."""
        if width not in self._rows:
            self._rows[width] = self.mean.repeat(width), self.std.repeat(width)
        return self._rows[width]


@dataclass(frozen=True)
class TrainContext:
    """What all stages of a run train with."""

    recipe: Recipe
    run: Run
    world: World
    images: Images
    identities: Mapping[str, Mapping[str, Any]]


def train_stage(instance: Instance, ctx: TrainContext) -> Done:
    """`train_together` with one instance."""
    (done,) = train_together([instance], ctx)
    return done


def train_together(instances: Sequence[Instance], ctx: TrainContext) -> list[Done]:
    """Train instances of one stage that see the same images to their end, from wherever they stand; a collective.

    One data stream and one teacher feed them all; each ends with the bits that it would have alone. They start at the
    newest step that all of them have saved. Where there is none, those ahead of the others train apart.

    Raises RunError if a folder is another training's or another process is writing it, TrainingError on a loss that
    is no number or too little memory.
    """
    assert len({(instance.stage_name, instance.data_seed) for instance in instances}) == 1
    with ExitStack() as stack:
        loader = stack.enter_context(closing(ctx.images.train(instances[0].data_seed)))
        if ctx.world.is_main:
            for place in (ctx.run.stage(instance.key) for instance in instances):
                stack.enter_context(place.lock())
                place.claim(ctx.identities[place.key])
        loader.preflight(ctx.images.num_classes)
        done: dict[str, Done] = {}
        for start, keys in ctx.world.broadcast(_starts(instances, ctx) if ctx.world.is_main else []):
            team = [instance for instance in instances if instance.key in keys]
            with _telling_of_memory(team[0]):
                done |= _Training(team, start, ctx, loader).run()
        return [done[instance.key] for instance in instances]


@contextmanager
def _telling_of_memory(instance: Instance) -> Iterator[None]:
    """Raises TrainingError in place of PyTorch's error where memory does not suffice."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"{instance.key}: out of memory; stages.{instance.stage_name}.optim.accumulate=2 takes half the images at "
            "a time, more processes share them, and `gowide plan` estimates what a network needs"
        ) from error


def _starts(instances: Sequence[Instance], ctx: TrainContext) -> list[tuple[int, list[str]]]:
    """The steps to start from, and which instances do."""
    saved = {}
    for key in (instance.key for instance in instances):
        own = fingerprint(ctx.identities[key])
        saved[key] = whole_checkpoints(ctx.run.stage(key).checkpoints, own) or [0]
    if common := set.intersection(*map(set, saved.values())):
        return [(max(common), list(saved))]
    starts = defaultdict(list)
    for key, steps in saved.items():
        starts[max(steps)].append(key)
    return list(starts.items())


def load_trained(instance: Instance, run: Run, num_classes: int) -> ResNet:
    """The finished network of a stage instance, on the CPU. Raises RunError if its weights are not those."""
    network = build_network(instance.architecture, num_classes)
    place = run.stage(instance.key)
    load_weights(place.model, network)
    if place.done:
        place.check_weights()
    return network


class _Training:
    """Students of one stage while they train, all at the same step."""

    def __init__(self, instances: Sequence[Instance], start: int, ctx: TrainContext, loader: Loader) -> None:
        self.ctx, self.loader, self.step = ctx, loader, start
        self.recipe, self.world, self.images = ctx.recipe, ctx.world, ctx.images
        first = instances[0]
        self.stage, self.name = first.stage, first.key
        if len(instances) > 1:
            self.name = f"{first.stage_name}/{{{','.join(instance.network_name for instance in instances)}}}"
        self.warned_of_data = False
        self.saved = self.counted = time.monotonic()
        self.writing = Background()
        self.stored = None
        if isinstance(self.stage, KlStage) and self.stage.teacher_logits == "stored":
            self.stored = self._stored_logits(first, self.stage)
        self.teacher: Teacher | None = None
        self.students = [self._student(instance) for instance in instances]
        self.timeline = self.students[0].timeline
        for student in self.students:
            self.stream = student.begin(start)  # the same for all

    def _student(self, instance: Instance) -> Student:
        """Where a stage starts: its own newest checkpoint, else the finished weights of `init`, else scratch."""
        ctx = self.ctx
        torch.manual_seed(instance.seed)
        network = build_network(instance.architecture, self.images.num_classes)
        if start := instance.init_file or (instance.init and ctx.run.stage(instance.init).model):
            load_weights(start, network)
        from_teacher = isinstance(instance.stage, TaughtStage) and instance.stage.start == "teacher"
        if instance.teacher and (from_teacher or not self.stored):
            wide = self._load_teacher(instance)  # every time: what is drawn afterwards is as if it trained alone
            if from_teacher:
                take_over(network, wide)
            if not self.stored:
                self.teacher = self.teacher or self._teacher(wide)
        objective = build_objective(instance.stage, self._placed(network), self.teacher, instance.seed)
        if self.recipe.compile:
            network.compile_blocks()
        if self.recipe.sync_batch_norm:
            objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-untyped-call]
        return Student(
            instance, objective, ctx.run.stage(instance.key), ctx.identities, ctx.recipe, ctx.world,
            self.loader.steps_per_epoch, self.writing,
        )  # fmt: skip

    def run(self) -> dict[str, Done]:
        """Train the steps that are left, evaluate, write the weights."""
        total = self.timeline.total_steps
        self.track = Track(
            self.name, total, "steps", start=self.step,
            rate_unit="images", per_thing=self.recipe.batch_size, quiet=not self.world.is_main,
        )  # fmt: skip
        with self.track, self.writing:
            if self.step:
                self.track.line(f"{self.name}  continues at step {self.step:,} of {total:,}")
            for phase in range(self.timeline.num_phases):
                if self.step < self.timeline.phase(phase).stop:
                    self._train_phase(phase)
            results = self._evaluate()
        self._count_seconds()
        found: dict[str, Done] = {}
        for student, result in zip(self.students, results, strict=True):
            key = student.instance.key
            done = self.world.broadcast(student.finish(self.step, result, self.stream) if self.world.is_main else None)
            assert done is not None
            found[key] = done
            self.track.line(
                f"{key}  done: top-1 {done.top1:.2f} %, top-5 {done.top5:.2f} %, "
                f"{done.epochs} epochs in {clock(done.seconds)}"
            )
        return found

    def _train_phase(self, phase: int) -> None:
        """Train from the current step to the end of `phase`."""
        steps = self.timeline.phase(phase)
        optim, schedule = self.stage.optim, self.stage.schedule
        assert optim is not None, "a stage that trains has an optim"
        blank = self._blank(self.recipe.batch_size // self.world.size // optim.accumulate)
        for student in self.students:
            student.begin_phase(phase, blank)
        for batch in self._batches(steps.stop):
            rate = learning_rate(self.step, steps, self.timeline.steps_per_epoch, optim, schedule)
            for index, part in enumerate(batch.chunk(optim.accumulate)):
                with self.teacher.cached() if self.teacher else nullcontext():
                    for student in self.students:
                        student.forward_backward(part, self.step, index, optim.accumulate)
            for student in self.students:
                student.step(rate)
            self.step += 1
            self._after_step(phase, rate)

    def _batches(self, stop: int) -> Iterator[Examples]:
        """The data stream from the current step to step `stop`, on the device."""
        steps_per_epoch = self.timeline.steps_per_epoch
        share = self.recipe.batch_size // self.world.size
        while self.step < stop:
            epoch, start = divmod(self.step, steps_per_epoch)
            with closing(self._epoch(epoch, start)) as batches:
                while self.step < min(stop, (epoch + 1) * steps_per_epoch):
                    asked = time.perf_counter()
                    batch = next(batches)
                    for student in self.students:
                        student.meter.waited(asked)
                    self.stream.add(self.step, batch.indices)
                    row = self.step * self.recipe.batch_size + self.world.rank * share
                    yield self._examples(batch, self.stored.train(row, share) if self.stored else None)

    def _epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from its step `start` on, in the resolution of the epoch."""
        ramp, resolution = self.stage.ramp, self.recipe.data.resolution
        return self.loader.batches(epoch, start, ramp.side(epoch, resolution) if ramp else resolution)

    def _validation(self) -> Iterator[Examples]:
        """This process's share of the validation images."""
        for batch in self.images.val.batches():
            first, count = int(batch.indices[0]), len(batch.indices)
            yield self._examples(batch, self.stored.val(first, count) if self.stored else None)

    def _examples(self, batch: Batch, stored: TeacherOutput | None) -> Examples:
        return Examples(*self.images.to_device(batch), stored.to(self.world.device) if stored else None)

    def _blank(self, num_images: int) -> Examples:
        """Black images with labels, in the shape of a part of a batch."""
        side, device = self.recipe.data.resolution, self.world.device
        images = torch.zeros(num_images, 3, side, side, device=device).to(memory_format=torch.channels_last)
        stored = self.stored.train(0, num_images).to(device) if self.stored else None
        return Examples(images, torch.zeros(num_images, dtype=torch.long, device=device), stored)

    def _after_step(self, phase: int, rate: float) -> None:
        """Record, evaluate and save where they are due. All processes come to the same decisions."""
        recipe, step, total = self.recipe, self.step, self.timeline.total_steps
        epoch, rest = divmod(step, self.timeline.steps_per_epoch)
        every_steps = recipe.checkpoints.every_steps
        self.writing.check()
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
                self._count_seconds()
                self.writing.wait()  # for the states before, so that never more than one of each is in memory
                for student in self.students:
                    student.save(step, self.stream)
                self.saved = time.monotonic()
        if signum:
            self.writing.wait()
            self.track.line(f"{self.name}  saved at step {step:,} of {total:,}: told to stop")
            raise Stopped(signum)

    def _record(self, rate: float) -> None:
        """Write the averages since the last record; a collective. Raises TrainingError on a loss that is no number."""
        values = [student.record(self.step, rate) for student in self.students]
        self.stream.collect(self.world)
        self.track.update(self.step, "loss " + ", ".join(f"{value['loss']:.4f}" for value in values))
        if (waited := values[0]["data_wait"]) > DATA_BOUND and not self.warned_of_data:
            self.warned_of_data = True
            self.track.line(
                f"{self.name}  warning: {waited:.0%} of the time is spent waiting for data; "
                "give the processes more CPU threads, or encode smaller images"
            )

    def _evaluate(self) -> list[dict[str, float]]:
        """Each student's means over the validation set: its losses, and accuracies in %; a collective."""
        with ExitStack() as stack:
            for student in self.students:
                student.objective.eval()
                stack.enter_context(student.averaged())
            stack.enter_context(torch.inference_mode())
            stack.enter_context(autocast(self.recipe, self.world))
            for student in self.students:
                self.world.broadcast_buffers(student.objective)
            means = mean_over_samples((self._judged(examples) for examples in self._validation()), self.world)
        results = []
        for index, student in enumerate(self.students):
            student.objective.train()
            mine = {name: value for (whose, name), value in means.items() if whose == index}
            results.append({name: 100 * mine[name] if name in ("top1", "top5") else mine[name] for name in mine})
            student.record_evaluation(self.step, results[-1])
        return results

    def _judged(self, examples: Examples) -> dict[tuple[int, str], Tensor]:
        """Losses and accuracies of each sample, [B] each, by student and name."""
        with self.teacher.cached() if self.teacher else nullcontext():
            return {
                (index, name): values
                for index, student in enumerate(self.students)
                for name, values in student.objective.evaluate(*examples).items()
            }

    def _stored_logits(self, instance: Instance, stage: KlStage) -> TeacherLogits:
        """The teacher's logits for the stream of this stage; the teacher is loaded only if they are not there yet."""
        ctx = self.ctx
        identity = ctx.identities[instance.key]
        temperature = stage.temperature if stage.top_k else 1.0  # all classes serve every temperature
        about = {
            "format": 1,
            **{name: identity[name] for name in ("teacher", "batch_size", "precision", "compile")},
            "data": {**identity["data"], "seed": instance.data_seed},
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
        teacher = functools.cache(lambda: self._teacher(self._load_teacher(instance)))

        def ask(batches: Iterator[Batch]) -> Iterator[Tensor]:
            for batch in batches:
                with autocast(self.recipe, self.world):
                    logits = teacher().logits(self.images.to_device(batch)[0])
                yield logits

        def source(epoch: int | None) -> Iterator[Tensor]:
            return ask(self.images.val.batches() if epoch is None else self._epoch(epoch))

        return stored_logits(ctx.run.teacher_logits, about, layout, source, self.world, self.name)

    def _load_teacher(self, instance: Instance) -> ResNet:
        assert instance.teacher
        return load_trained(self.recipe.instances[instance.teacher], self.ctx.run, self.images.num_classes)

    def _teacher(self, wide: ResNet) -> Teacher:
        return Teacher(self._placed(wide), compiled=self.recipe.compile)

    def _placed(self, network: ResNet) -> ResNet:
        return network.to(self.world.device).to(memory_format=torch.channels_last)

    def _count_seconds(self) -> None:
        """Share the time since the last count equally between the students."""
        now = time.monotonic()
        for student in self.students:
            student.seconds += (now - self.counted) / len(self.students)
        self.counted = now
