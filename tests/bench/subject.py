"""What is measured: a recipe's networks, batch size and images, and the package's own steps, loop and files.

All that the measurements use of how the package trains is here, so that a change there has one place to follow.
"""

import contextlib
import io
import itertools
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gowide_dist.data.loader import Batch
from gowide_dist.identity import identities
from gowide_dist.instances import Instance
from gowide_dist.networks.architecture import Architecture
from gowide_dist.networks.build import build_network
from gowide_dist.networks.network import Network
from gowide_dist.networks.teacher import Teacher
from gowide_dist.pipeline import open_data
from gowide_dist.prepare import check_data
from gowide_dist.recipe import Recipe
from gowide_dist.run import Run
from gowide_dist.stages import LabelsStage, Optim, Stage
from gowide_dist.train.checkpoint import save_checkpoint
from gowide_dist.train.context import TrainContext, TrainData, autocast
from gowide_dist.train.loop import train_together
from gowide_dist.train.objectives import Labels, Objective, build_objective
from gowide_dist.train.optim import Optimizer
from gowide_dist.train.teacher_logits import Layout, stored_logits
from gowide_dist.world import World, join
from tests.bench.pairs import Effort

NUM_BATCHES = 4  # in memory, taken over and over
OPTIM = Optim(lr=1e-3, weight_decay=5e-4)  # of every step that is measured: seconds do not depend on the values


class TrainingStep:
    """What the loop does with a batch, without the loop: forward, backward and a step of the optimizer."""

    def __init__(self, objective: Objective, recipe: Recipe, world: World) -> None:
        self._wrapped = world.wrap(objective.train())
        self._optimizer = Optimizer(objective, OPTIM, scaled=recipe.precision == "fp16")
        self._precision, self._world = recipe.precision, world

    def __call__(self, *batch: Any, no_sync: bool = False) -> None:
        """batch: images, labels and, where they are stored, the step and the teacher's output."""
        with self._world.no_sync(self._wrapped, no_sync):
            with autocast(self._precision, self._world.device):
                losses = self._wrapped(*batch)
            self._optimizer.backward(losses["loss"])
        self._optimizer.step(OPTIM.lr)


@dataclass(frozen=True)
class Subject:
    """What the measurements share. Weights are random: speed does not depend on them."""

    recipe: Recipe
    checksums: Mapping[str, str]
    world: World
    data: TrainData
    batches: tuple[Batch, ...]
    folder: Path
    effort: Effort

    def instance(self, *objectives: str) -> Instance:
        """The first stage with one of these objectives, which the recipe has."""
        return next(one for one in self.recipe.instances.values() if one.stage.objective in objectives)

    @cached_property
    def student(self) -> Architecture:
        """The first network that a teacher teaches, or without one the first that is trained."""
        instances = self.recipe.instances.values()
        return next((one for one in instances if one.teacher), next(iter(instances))).architecture

    @cached_property
    def inputs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The batches as networks take them: images [B, 3, H, H], normalised, and labels [B]."""
        return tuple(inputs(self.data, batch) for batch in self.batches)

    def autocast(self) -> torch.autocast:
        return autocast(self.recipe.precision, self.world.device)

    def network(self, architecture: Architecture) -> Network:
        """A network as the training loop has it."""
        network = self.plain_network(architecture).to(memory_format=torch.channels_last)
        if self.recipe.compile:
            network.compile_blocks()
        return network

    def plain_network(self, architecture: Architecture) -> Network:
        """A network as PyTorch makes it: eager, NCHW."""
        return build_network(architecture, self.data.num_classes).to(self.world.device)

    def teacher_of(self, instance: Instance) -> Architecture:
        assert instance.teacher is not None
        return self.recipe.instances[instance.teacher].architecture

    def teacher(self, instance: Instance, *, compiled: bool | None = None) -> Teacher:
        """The teacher of a stage; compiled as the recipe says, unless told."""
        network = self.plain_network(self.teacher_of(instance)).to(memory_format=torch.channels_last)
        return Teacher(network, compiled=self.recipe.compile if compiled is None else compiled)

    def step(
        self, instance: Instance, teacher: Teacher | None, stage: Stage | None = None, phase: int = 0
    ) -> TrainingStep:
        """A step of a stage, or of `stage` with its network, which trains a new student. teacher: None where stored."""
        objective = build_objective(stage or instance.stage, self.network(instance.architecture), teacher)
        objective.begin_phase(phase)
        return TrainingStep(objective, self.recipe, self.world)

    def stored_step(self, instance: Instance, teacher: Teacher) -> Any:
        """A step of a stage on images and labels that reads the teacher's logits from their file."""
        rows = sum(len(labels) for _, labels in self.inputs)
        layout = Layout(1, rows, 1, self.data.num_classes, None, 1.0)

        def forward(inputs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
            with self.autocast():
                yield from (teacher.logits(images) for images, _ in inputs)

        first = self.inputs[0][0][:1], self.inputs[0][1][:1]

        def source(block: int) -> Iterator[Tensor]:
            return forward(self.inputs if block < layout.epochs else [first])

        with contextlib.redirect_stdout(io.StringIO()):
            logits = stored_logits(self.folder, {"for": "bench"}, layout, source, self.world, "bench")
        step = self.step(instance, None)
        starts = itertools.cycle(range(0, rows, self.recipe.batch_size))

        def stored(images: Tensor, labels: Tensor) -> None:
            step(images, labels, logits.train(next(starts), len(labels)).to(self.world.device))

        return stored

    def run_loop(self, architecture: Architecture, stream: Any, **changes: Any) -> None:
        """Train a network on labels in the real loop, until the stream ends by raising Enough.

        stream: in place of the training images' Loader. changes: of the recipe.
        """
        stage = LabelsStage(train=("network",), objective="labels", epochs=1, optim=OPTIM)
        recipe = Recipe.model_validate(
            {
                **self.recipe.model_dump(),
                "networks": {"network": architecture.model_dump()},
                "stages": {"stage": stage.model_dump()},
                **changes,
            }
        )
        data = replace(self.data, train=lambda seed: stream)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            ctx = TrainContext(recipe, Run(Path(folder)), self.world, data, identities(recipe, self.checksums))
            with contextlib.suppress(Enough), contextlib.redirect_stdout(io.StringIO()):
                train_together([recipe.instances["stage/network"]], ctx)
            for thread in threading.enumerate():  # a loop that ends by an error leaves its last checkpoint to a thread
                if thread.name.startswith("writer"):
                    thread.join()

    def save(self, network: Network, step: int) -> None:
        """Write a training state: weights, statistics, and momentum in the parameters' shapes."""
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        state = {"objective": network.state_dict(), "momentum": list(network.parameters())}
        save_checkpoint(folder, state, step=step, metadata={"fingerprint": ""}, keep=1)


class Enough(Exception):  # noqa: N818 -- no error
    """All pairs are measured."""


def inputs(data: TrainData, batch: Batch) -> tuple[Tensor, Tensor]:
    """A batch as networks take it: images [B, 3, H, H], normalised, and labels."""
    pixels, labels = data.to_device(batch)
    return data.normalised(pixels), labels


def endless_batches(data: TrainData, seed: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Batches from the loader, epoch after epoch, as networks take them: images [B, 3, H, H] and labels [B]."""
    with closing(data.train(seed)) as loader:
        for epoch in itertools.count():
            with closing(loader.batches(epoch)) as batches:
                for batch in batches:
                    yield inputs(data, batch)


@contextmanager
def open_subject(recipe: Recipe, folder: Path, effort: Effort) -> Iterator[Subject]:
    """Read what the measurements need; `folder` is for what they write. Raises DataError if the data is not there."""
    recipe, checksums = check_data(recipe)
    with join() as world, open_data(recipe, world) as data:
        with closing(data.train(recipe.seed)) as loader, closing(loader.batches()) as batches:
            some = itertools.islice(batches, NUM_BATCHES)
            kept = tuple(batch._replace(images=batch.images.clone()) for batch in some)
        yield Subject(recipe, checksums, world, data, kept, folder, effort)


@contextmanager
def open_member(recipe: Recipe, architecture: Architecture) -> Iterator[tuple[TrainingStep, World, Iterator[Any]]]:
    """In a process of a group: a step that trains a network on labels, the group, and batches from the loader."""
    recipe, _ = check_data(recipe)
    with join() as world, open_data(recipe, world) as data:
        torch.manual_seed(0)
        network = build_network(architecture, data.num_classes).to(memory_format=torch.channels_last)
        with closing(endless_batches(data, recipe.seed)) as batches:
            yield TrainingStep(Labels(network), recipe, world), world, batches
