"""What is measured: the networks, the batch size and the images of a recipe, and a training step of them."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gowide_dist.data.loader import Batch
from gowide_dist.insight.bench.pairs import Effort
from gowide_dist.networks.architecture import Architecture
from gowide_dist.networks.resnet import ResNet, build_network
from gowide_dist.networks.teacher import Teacher
from gowide_dist.pipeline import open_images
from gowide_dist.prepare import check_data
from gowide_dist.recipe import Instance, Optim, Recipe
from gowide_dist.train.loop import Images
from gowide_dist.train.objectives import Objective
from gowide_dist.train.optim import Optimizer
from gowide_dist.train.student import autocast
from gowide_dist.world import World, join

NUM_BATCHES = 4  # in memory, taken over and over
OPTIM = Optim(lr=1e-3, weight_decay=5e-4)  # of every step that is measured: seconds don't depend on the values


@dataclass(frozen=True)
class Subject:
    """What the measurements share. The networks have random weights: how fast they are does not depend on them."""

    recipe: Recipe
    checksums: Mapping[str, str]
    world: World
    images: Images
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
        return tuple(self.images.to_device(batch) for batch in self.batches)

    def network(self, architecture: Architecture) -> ResNet:
        """A network as the training loop has it."""
        network = self.plain_network(architecture).to(memory_format=torch.channels_last)
        if self.recipe.compile:
            network.compile_blocks()
        return network

    def plain_network(self, architecture: Architecture) -> ResNet:
        """A network as PyTorch makes it: eager, NCHW."""
        return build_network(architecture, self.images.num_classes).to(self.world.device)

    def teacher(self, instance: Instance, *, compiled: bool | None = None) -> Teacher:
        """The teacher of a stage; compiled as the recipe says, unless told."""
        network = self.plain_network(self.teacher_of(instance)).to(memory_format=torch.channels_last)
        return Teacher(network, compiled=self.recipe.compile if compiled is None else compiled)

    def teacher_of(self, instance: Instance) -> Architecture:
        """The architecture of the network that teaches a stage."""
        assert instance.teacher is not None
        return self.recipe.instances[instance.teacher].architecture

    def step(self, objective: Objective) -> TrainingStep:
        """A training step of an objective that is ready to train."""
        return TrainingStep(objective, self.recipe, self.world)


class TrainingStep:
    """What the loop does with a batch, without the loop: forward, backward and a step of the optimiser."""

    def __init__(self, objective: Objective, recipe: Recipe, world: World) -> None:
        self._wrapped = world.wrap(objective.train())
        self._descent = Optimizer(objective, OPTIM, scaled=recipe.precision == "fp16")
        self._recipe, self._world = recipe, world

    def __call__(self, *batch: Any, apart: bool = False) -> None:
        """One step on a batch. apart: without averaging the gradients over the processes."""
        with self._world.no_sync(self._wrapped, apart):
            with autocast(self._recipe, self._world):
                losses = self._wrapped(*batch)
            self._descent.backward(losses["loss"])
        self._descent.step(OPTIM.lr)


def endless_batches(images: Images, seed: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Batches from the loader, epoch after epoch, as networks take them: images [B, 3, H, H] and labels [B]."""
    with closing(images.train(seed)) as loader:
        for epoch in itertools.count():
            with closing(loader.batches(epoch)) as batches:
                for batch in batches:
                    yield images.to_device(batch)


@contextmanager
def open_subject(recipe: Recipe, folder: Path, effort: Effort) -> Iterator[Subject]:
    """Read what the measurements need; `folder` is for what they write. Raises DataError if the data is not there."""
    recipe, checksums = check_data(recipe)
    with join() as world, open_images(recipe, world) as images:
        with closing(images.train(recipe.seed)) as loader, closing(loader.batches()) as batches:
            some = itertools.islice(batches, NUM_BATCHES)
            kept = tuple(batch._replace(images=batch.images.clone()) for batch in some)
        yield Subject(recipe, checksums, world, images, kept, folder, effort)
