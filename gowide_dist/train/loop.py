"""The training loop: one for every objective, device and number of processes, and for several students at once.

`train_together` finds where the students start (see `start`) and runs `StageTraining`, which reads from top to bottom:
a stage is phases, a phase is steps, a step is forward, backward and the optimizer's step of each student, and then
whatever is due: a record, an evaluation, a checkpoint, the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial

import torch

from gowide_dist.data.loader import Loader
from gowide_dist.instances import Instance
from gowide_dist.networks.teacher import Teacher
from gowide_dist.progress import Track, clock
from gowide_dist.run import Done, top5_is_telling
from gowide_dist.stop import Stopped
from gowide_dist.timeline import Batching
from gowide_dist.train.context import TrainContext, Views, chunk, configure_backends
from gowide_dist.train.costs import HOST_PARTS, memory_per_process, memory_together
from gowide_dist.train.losses import balanced_weights
from gowide_dist.train.metrics import mean_over_samples
from gowide_dist.train.objectives import Losses
from gowide_dist.train.optim import learning_rate
from gowide_dist.train.start import build_students, start_steps, stored_logits_of
from gowide_dist.train.stream import Stream
from gowide_dist.train.student import Student, TrainingError
from gowide_dist.train.writing import Writer

OUT_OF_MEMORY = "can't allocate memory", "out of memory", "ALLOC_FAILED"  # of the CPU, CUDA and cuBLAS
DATA_BOUND = 0.3  # warn above this fraction of time spent waiting for data


def train_together(instances: Sequence[Instance], ctx: TrainContext) -> list[Done]:
    """Train the instances of a stage to their end, continuing from their checkpoints; a collective.

    They see the same images and share one pass of the teacher; each ends bit-identical to training alone. Where their
    checkpoints have no step in common, groups of them train one after the other (`start.start_steps`).

    Raises RunError if a folder belongs to another training run or another process is writing to it, TrainingError on a
    non-finite loss or when out of memory.
    """
    assert len({(instance.stage_name, instance.data_seed) for instance in instances}) == 1
    configure_backends(ctx.recipe, instances[0].stage)
    with ExitStack() as stack:
        loader = stack.enter_context(closing(ctx.data.train(instances[0].data_seed)))
        ctx.world.on_main(lambda: _claim(instances, ctx, stack))
        loader.preflight(ctx.data.num_classes)
        done: dict[str, Done] = {}
        for start, keys in ctx.world.on_main(lambda: start_steps(instances, ctx)):
            group = [instance for instance in instances if instance.key in keys]
            with _explaining_out_of_memory(group, ctx):
                done |= StageTraining(group, start, ctx, loader).run()
        return [done[instance.key] for instance in instances]


def store_logits(instances: Sequence[Instance], ctx: TrainContext) -> None:
    """Store the teacher's logits that the instances of a stage train with, unless they are stored; a collective."""
    configure_backends(ctx.recipe, instances[0].stage)
    with closing(ctx.data.train(instances[0].data_seed)) as loader:
        loader.preflight(ctx.data.num_classes)
        stored_logits_of(instances[0], Stream(loader, instances, ctx), ctx, f"logits of {display_name(instances)}")


def _claim(instances: Sequence[Instance], ctx: TrainContext, stack: ExitStack) -> None:
    """Become the one writer of the instances' folders, until the stack unwinds."""
    for instance in instances:
        stage_dir = ctx.run.stage(instance.key)
        stack.enter_context(stage_dir.lock())
        stage_dir.claim(ctx.identities[instance.key])


@contextmanager
def _explaining_out_of_memory(instances: Sequence[Instance], ctx: TrainContext) -> Iterator[None]:
    """Raises TrainingError in place of PyTorch's error where memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        named = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not named and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise TrainingError(_out_of_memory(instances, ctx)) from error


def _out_of_memory(instances: Sequence[Instance], ctx: TrainContext) -> str:
    """What needs how much memory by estimate, and what to do."""
    stage, world = instances[0].stage, ctx.world
    batching = Batching(ctx.recipe.batch_size, world.size, accumulate=stage.optim.accumulate if stage.optim else 1)
    on_gpu = world.device.type != "cpu"
    memory = memory_together(
        [
            memory_per_process(
                instance, ctx.recipe, ctx.data.num_classes, batching, world.num_loader_threads,
                on_gpu=on_gpu, teacher_runs=not stage.has_stored_logits,
            )
            for instance in instances
        ]
    )  # fmt: skip
    needed = sum(num_bytes for part, num_bytes in memory.items() if not (on_gpu and part in HOST_PARTS))
    of_images = sum(memory[part] for part in ("activations", "transient", "heap"))
    divisors = (n for n in range(batching.accumulate + 1, batching.local_batch + 1) if batching.local_batch % n == 0)
    smaller = next((f"set stages.{instances[0].stage_name}.optim.accumulate={n}, or " for n in divisors), "")
    networks = f"{', '.join(each.network_name for each in instances)} {'need' if len(instances) > 1 else 'needs'}"
    apart = ", or with --sequential (on a cluster: together: false)" if len(instances) > 1 else ""
    return (
        f"{display_name(instances)}: out of memory; {networks} about {needed / 1e9:.2f} GB per "
        f"process, {of_images / 1e9:.2f} GB of it for {batching.micro_batch} images at a time; "
        f"{smaller}train in more processes{apart}"
    )


class StageTraining:
    """Students of one stage while they train, all at the same step of one data stream."""

    def __init__(self, instances: Sequence[Instance], start: int, ctx: TrainContext, loader: Loader) -> None:
        self.ctx, self.recipe, self.world = ctx, ctx.recipe, ctx.world
        self.stage, self.name = instances[0].stage, display_name(instances)
        self.writer = Writer(self.world.is_main)
        self.stream = Stream(loader, instances, ctx)
        self.students, self.teacher = build_students(instances, start, self.stream, self.writer, ctx, self.name)
        self.timeline = self.students[0].timeline
        self.step = start
        self.warned_of_data = False
        self.saved_at = self.counted_at = time.monotonic()

    def run(self) -> dict[str, Done]:
        """Train the steps that are left, evaluate, write the weights."""
        total = self.timeline.total_steps
        self.track = Track(
            self.name, total, "steps", start=self.step, batch_size=self.recipe.batch_size, quiet=not self.world.is_main
        )
        with self.track, self.writer:
            if self.step:
                self.track.line(f"{self.name}  continues at step {self.step:,} of {total:,}")
            for phase in range(self.timeline.num_phases):
                if self.step < self.timeline.phase(phase).stop:
                    self._train_phase(phase)
            results = self._evaluate()
            self.world.on_main(self.writer.check)
            self._count_seconds()
            return self.world.on_main(lambda: self._finish(results))

    def _train_phase(self, phase: int) -> None:
        """Train from the current step to the end of `phase`."""
        blank = self.stream.blank(self.timeline.batching)
        for student in self.students:
            student.begin_phase(phase, blank)
        for batch in self.stream.train(self.timeline, self.step, self.timeline.phase(phase).stop):
            lr = learning_rate(self.step, self.timeline, self.stage)
            self._train_step(batch, lr)
            self.step += 1
            self._after_step(phase, lr)

    def _train_step(self, batch: Views, lr: float) -> None:
        """Forward and backward of every student, in as many passes as memory asks for, then the optimizers' steps."""
        num_passes = self.timeline.batching.accumulate
        for index, part in enumerate(chunk(batch, num_passes)):
            with _shared(self.teacher, part):
                for student in self.students:
                    student.forward_backward(part, self.step, index, num_passes)
        for student in self.students:
            student.update(self.step, lr)

    def _after_step(self, phase: int, lr: float) -> None:
        """Record, evaluate, save and stop where these are due.

        Every process decides alike, by the step and by the vote: an all-reduce that runs beside the next step and
        tells all of a signal or a failed write that one of them knows of (`world.Ballot`). Only the clock differs
        between processes, so a checkpoint that is due by the clock must need no other process: rank 0 alone writes.
        """
        step, recipe = self.step, self.recipe
        epochs_done, step_of_epoch = divmod(step, self.timeline.steps_per_epoch)
        vote = self.world.vote(failed=self.writer.failed)
        if vote.failed:
            self.world.on_main(self.writer.check)  # raises on every process

        is_over = step == self.timeline.total_steps
        epoch_ends = step_of_epoch == 0
        steps_of_phase = self.timeline.phase(phase)
        phase_begins, phase_ends = step == steps_of_phase.start + 1, step == steps_of_phase.stop
        stop_due = vote.signum != 0 and not is_over  # one that is over finishes: that takes no longer than to save
        save_due = not is_over and (stop_due or is_multiple(step, recipe.checkpoints.every_steps))
        evaluate_due = not is_over and epoch_ends and is_multiple(epochs_done, recipe.eval_every_epochs)
        # Before a checkpoint too: a restart would lose the losses that are not recorded yet.
        # At a phase's first step, for its curve to begin there.
        record_due = save_due or epoch_ends or phase_begins or phase_ends or is_multiple(step, recipe.log_every_steps)

        if record_due:
            self._record(lr)
        if evaluate_due:
            self._evaluate()
        if save_due or (record_due and not is_over and self._save_is_due_by_the_clock()):
            self._save()
        if stop_due:
            self.world.on_main(self.writer.check)
            self.track.line(f"{self.name}  stop requested; saved at step {step:,} of {self.timeline.total_steps:,}")
            raise Stopped(vote.signum)

    def _record(self, lr: float) -> None:
        """Write the averages since the last record; a collective. Raises TrainingError on a non-finite loss."""
        steps_per_s, data_wait = self.stream.throughput.flush()
        losses = [student.mean_losses() for student in self.students]
        self.stream.digest.collect(self.world)
        speed = {"data_wait": data_wait, "images_per_s": steps_per_s * self.recipe.batch_size}
        for student, means in zip(self.students, losses, strict=True):
            comm_wait = min(1 - data_wait, self.world.communication_s(student.wrapped) * steps_per_s)
            values = {"lr": lr, **means, **speed, "comm_wait": comm_wait}
            self.writer.write(partial(student.record, "train", self.step, values))
        self.track.update(self.step, "loss " + ", ".join(f"{means['loss']:.4f}" for means in losses))
        # The first step waits for the first batches, whatever comes after them.
        if data_wait > DATA_BOUND and self.step > 1 and not self.warned_of_data:
            self.warned_of_data = True
            self.track.line(
                f"{self.name}  warning: {data_wait:.0%} of the time is spent waiting for data; "
                "give the processes more CPU threads, or encode smaller images"
            )

    def _evaluate(self) -> list[dict[str, float]]:
        """Evaluate and record every student; its losses, and accuracies in %."""
        results = evaluate(self.students, self.teacher, self.stream, self.ctx)
        for student, means in zip(self.students, results, strict=True):
            self.writer.write(partial(student.record, "val", self.step, means))
        return results

    def _save_is_due_by_the_clock(self) -> bool:
        every_minutes = self.recipe.checkpoints.every_minutes
        if every_minutes is None or self.writer.is_busy:  # with the last one: waiting for it would stop all processes
            return False
        return time.monotonic() - self.saved_at > 60 * every_minutes

    def _save(self) -> None:
        """Save every student, in the background."""
        self._count_seconds()
        self.writer.wait()  # until the last checkpoint is written: one copy of a state in memory is enough
        for student in self.students:
            self.writer.write(partial(student.save, self.step, str(self.stream.digest)))
        self.saved_at = time.monotonic()

    def _finish(self, results: Sequence[dict[str, float]]) -> dict[str, Done]:
        """Write what the students leave behind; rank 0 only."""
        done = {}
        num_classes = self.ctx.data.num_classes
        for student, means in zip(self.students, results, strict=True):
            key = student.instance.key
            done[key] = student.finish(self.step, means, str(self.stream.digest))
            top5 = f"top-5 {done[key].top5:.2f} %, " if top5_is_telling(num_classes) else ""
            self.track.line(
                f"{key}  done: top-1 {done[key].top1:.2f} %, {top5}"
                f"{done[key].epochs} epochs in {clock(done[key].seconds)}"
            )
        return done

    def _count_seconds(self) -> None:
        """Add the time since the last count to the students, an equal part to each."""
        now = time.monotonic()
        for student in self.students:
            student.seconds += (now - self.counted_at) / len(self.students)
        self.counted_at = now


def evaluate(
    students: Sequence[Student], teacher: Teacher | None, stream: Stream, ctx: TrainContext
) -> list[dict[str, float]]:
    """Each student's means over the validation set: its losses, and accuracies in %; a collective.

    balanced_top1: the mean of the classes' top-1, in which each has the same weight.
    """
    weights = balanced_weights(ctx.data.val.class_counts(ctx.data.num_classes)).to(ctx.world.device)

    def evaluate_batch(batch: Views) -> list[Losses]:
        with _shared(teacher, batch):
            results = [student.objective.evaluate(*batch[student.normalise]) for student in students]
        labels = next(iter(batch.values())).labels
        return [{**losses, "balanced_top1": losses["top1"] * weights[labels]} for losses in results]

    with ExitStack() as stack:
        for student in students:
            student.objective.eval()
            stack.enter_context(student.averaged())
        stack.enter_context(torch.inference_mode())
        stack.enter_context(ctx.autocast())
        for student in students:
            ctx.world.broadcast_buffers(student.objective)
        results = mean_over_samples(map(evaluate_batch, stream.validation()), ctx.world)
    for student, means in zip(students, results, strict=True):
        student.objective.train()
        means |= {name: 100 * means[name] for name in ("top1", "top5", "balanced_top1")}
    return results


def _shared(teacher: Teacher | None, batch: Views) -> AbstractContextManager[None]:
    """Inside, the teacher looks at the batch as it is normalised for it, once for all students."""
    return teacher.cached(batch[teacher.normalise].images) if teacher else nullcontext()


def display_name(instances: Sequence[Instance]) -> str:
    """`stage/network`, or `stage/{one,other}` for several."""
    if len(instances) == 1:
        return instances[0].key
    return f"{instances[0].stage_name}/{{{','.join(instance.network_name for instance in instances)}}}"


def is_multiple(count: int, interval: int | None) -> bool:
    """Whether `count` is a multiple of `interval`; False if there is none."""
    return interval is not None and count % interval == 0
