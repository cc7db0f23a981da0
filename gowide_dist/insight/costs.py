"""What stages cost, as PyTorch counts it: their real objectives take a step on the meta device.

Tensors have shapes there and no values, so that a step of any network takes a second and no memory. Whatever runs is
counted: linear transforms, frozen blocks, the teacher. Multiply-adds are counted once, as torchvision's tables do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gowide_dist.networks.architecture import Architecture
from gowide_dist.networks.resnet import ResNet, build_network
from gowide_dist.networks.teacher import Teacher
from gowide_dist.recipe import Instance, Recipe, StageBase
from gowide_dist.timeline import Batching
from gowide_dist.train.objectives import Objective, build_objective

_IMAGES = 8  # of a batch where only multiply-adds are wanted
IMPORTS = 500_000_000  # bytes of PyTorch once it is loaded, about
FIRST_STEP = 115_000_000  # what comes with the first step: kernels, threads, logs
# On CPUs: bytes of heap without a tensor, for each byte of activations. glibc keeps freed blocks for the next step, and
# since each is aligned anew, few fit where one of their size was. Measured: 0.4 to 0.75, once 1.1.
HEAP_WASTE = 0.65


class MacsPerImage(NamedTuple):
    """Multiply-adds for one image: of the student, forward and backward, and of the teacher."""

    forward: float
    backward: float
    teacher: float

    @property
    def student(self) -> float:
        return self.forward + self.backward

    @property
    def total(self) -> float:
        return self.student + self.teacher


class NetworkCost(NamedTuple):
    """Trainable parameters, and multiply-adds of one image's forward pass."""

    parameters: int
    macs: float


class StageCost(NamedTuple):
    """What it costs to train a stage's objective, with a live teacher where it has one.

    phases: multiply-adds in each, equally long. validation: for one validation image. weights: parameters of the
    student and of what is trained with it. trained: the most of them that a phase trains. Of the phase that takes most
    memory, bytes of a batch in float32: activations, which the backward pass needs; transient, what lives beside them
    for a moment, as layers of the teacher and gradients of activations do.
    """

    phases: tuple[MacsPerImage, ...]
    validation: MacsPerImage
    weights: int
    trained: int
    teacher_weights: int
    activations: int
    transient: int

    @property
    def macs(self) -> MacsPerImage:
        """Averaged over the phases."""
        return _mean(self.phases)


@cache
def network_cost(architecture: Architecture, num_classes: int, resolution: int) -> NetworkCost:
    """Parameters and multiply-adds of a network for square images of side `resolution` px."""
    network = _on_meta(architecture, num_classes).eval()
    images, _ = _batch(1, resolution)
    return NetworkCost(_num_parameters(network), _flops(lambda: network(images)) / 2)


def stage_cost(
    instance: Instance, recipe: Recipe, num_classes: int, *, side: int | None = None, num_images: int = _IMAGES
) -> StageCost:
    """The cost of training an instance on `num_images` images at once. side: px; default: the data's resolution."""
    teacher = recipe.instances[instance.teacher].architecture if instance.teacher else None
    side = side or recipe.data.resolution
    num_images = max(2, num_images)  # batch norms refuse a single value
    key = (*kind(instance, recipe), num_classes, side, num_images)
    if key not in _stage_costs:
        _stage_costs[key] = _count(instance, teacher, num_classes, side, num_images)
    return _stage_costs[key]


_stage_costs: dict[Any, StageCost] = {}
_NO_COST = {*StageBase.model_fields, "teacher", "start", "teacher_logits", "top_k"}  # options of a stage


def kind(instance: Instance, recipe: Recipe) -> tuple[Any, ...]:
    """Equal for instances whose steps cost the same."""
    optim = instance.stage.optim
    return (
        instance.architecture,
        recipe.instances[instance.teacher].architecture if instance.teacher else None,
        *instance.stage.model_dump(exclude=_NO_COST).items(),
        *((optim.accumulate, bool(optim.ema)) if optim else ()),
    )


def training_macs(
    instance: Instance, recipe: Recipe, num_classes: int, *, num_images: int = _IMAGES, teacher_runs: bool = True
) -> MacsPerImage:
    """The cost of training on one image, averaged over the phases and, if images grow, the epochs of the stage.

    teacher_runs: False where its outputs are known: they are stored, or another student has asked.
    """
    stage, resolution = instance.stage, recipe.data.resolution
    sides = [stage.ramp.side(epoch, resolution) for epoch in range(stage.epochs)] if stage.ramp else []
    macs = _mean(
        stage_cost(instance, recipe, num_classes, side=side, num_images=num_images).macs
        for side in sides or [resolution]
    )
    return macs if teacher_runs else macs._replace(teacher=0.0)


def _count(
    instance: Instance, teacher_architecture: Architecture | None, num_classes: int, side: int, num_images: int
) -> StageCost:
    network = _on_meta(teacher_architecture, num_classes) if teacher_architecture else None
    with torch.device("meta"):
        teacher = Teacher(network) if network else None
        objective = build_objective(instance.stage, _on_meta(instance.architecture, num_classes), teacher, seed=0)
    images, labels = _batch(num_images, side)
    phases = [_count_phase(objective, teacher, phase, images, labels) for phase in range(objective.num_phases)]
    largest = max(phases, key=lambda phase: 8 * phase.trained + phase.activations + phase.transient)
    objective.eval()
    with teacher.cached() if teacher else nullcontext():
        both = _flops(lambda: objective.evaluate(images, labels))
        student = _flops(lambda: objective.evaluate(images, labels)) if teacher else both
    return StageCost(
        phases=tuple(phase.macs for phase in phases),
        validation=MacsPerImage(*(flops / 2 / num_images for flops in (student, 0, both - student))),
        weights=_num_parameters(objective),
        trained=max(phase.trained for phase in phases),
        teacher_weights=_num_parameters(network) if network else 0,
        activations=largest.activations,
        transient=largest.transient,
    )


class _PhaseCost(NamedTuple):
    macs: MacsPerImage
    trained: int
    activations: int
    transient: int


def _count_phase(
    objective: Objective, teacher: Teacher | None, phase: int, images: Tensor, labels: Tensor
) -> _PhaseCost:
    objective.begin_phase(phase)
    objective.train()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    for parameter in trained:  # counted by itself: here only what a step takes beside it
        parameter.grad = torch.empty_like(parameter)
    with teacher.cached() if teacher else nullcontext():
        with FlopCounterMode(display=False) as step, _LiveBytes() as live:
            loss = objective(images, labels)["loss"]
            forward, activations = step.get_total_flops(), live.bytes
            loss.backward()
        # the teacher's outputs are known now
        student = _flops(lambda: objective(images, labels)) if teacher else forward
    macs = (student, step.get_total_flops() - forward, forward - student)
    return _PhaseCost(
        MacsPerImage(*(flops / 2 / len(images) for flops in macs)),
        sum(parameter.numel() for parameter in trained),
        activations,
        live.peak - activations,
    )


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that were made inside and still live, each storage once, and the most at any time.

    Right after a forward pass these are what autograd has saved for the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()

    @property
    def bytes(self) -> int:
        return sum(self._live.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)):
            self._live[storage] = storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        return outputs


def _on_meta(architecture: Architecture, num_classes: int) -> ResNet:
    with torch.device("meta"):
        return build_network(architecture, num_classes)


def _batch(num_images: int, side: int) -> tuple[Tensor, Tensor]:
    images = torch.empty(num_images, 3, side, side, device="meta").to(memory_format=torch.channels_last)
    return images, torch.zeros(num_images, dtype=torch.long, device="meta")


def _flops(forward: Callable[[], Any]) -> float:
    """Operations: a multiply and an add are two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return float(counter.get_total_flops())


def _mean(costs: Iterable[MacsPerImage]) -> MacsPerImage:
    return MacsPerImage(*(fmean(values) for values in zip(*costs, strict=True)))


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Memory(NamedTuple):
    """Bytes that a training process needs, by what needs them.

    weights: 4 bytes a parameter. gradients and momentum: 4 each, of the parameters that a phase trains. average: 4, if
    there is a moving average. activations and transient: as in `StageCost`, of the images that a process takes at a
    time, half of it in bf16 and fp16. teacher: its weights. images: as bytes, and as the network's input. The rest lies
    in the host's memory: loader, decoded batches that wait; checkpoint, a copy that is written in the background; heap,
    on CPUs alone, what malloc keeps beside activations. libraries: PyTorch, about; its files, half a GB that all
    processes of a machine share, come on top, and so do the pages of the dataset that the system caches.
    """

    weights: int
    gradients: int
    momentum: int
    average: int
    activations: int
    transient: int
    teacher: int
    images: int
    loader: int
    checkpoint: int
    heap: int
    libraries: int

    @property
    def device(self) -> int:
        """On a GPU."""
        return sum(self) - self.loader - self.checkpoint - self.heap


def memory_per_process(
    instance: Instance,
    recipe: Recipe,
    num_classes: int,
    batching: Batching,
    num_threads: int,
    *,
    on_gpu: bool = False,
    teacher_runs: bool = True,
    saves: bool = False,
) -> Memory:
    """The memory of one process, which decodes its images in `num_threads` threads. saves: checkpoints on the way."""
    stage, optim = instance.stage, instance.stage.optim
    cost = stage_cost(instance, recipe, num_classes, num_images=batching.micro_batch)
    pixels = batching.local_batch * 3 * recipe.data.resolution**2
    size = 4 if recipe.precision == "float32" else 2
    activations, transient = (
        size * number // 4 if stage.epochs else 0 for number in (cost.activations, cost.transient)
    )
    weights, trained = 4 * cost.weights, 4 * cost.trained if stage.epochs else 0
    momentum = trained if optim and optim.momentum else 0
    average = weights if optim and optim.ema else 0
    return Memory(
        weights=weights,
        gradients=trained,
        momentum=momentum,
        average=average,
        activations=activations,
        transient=transient,
        teacher=4 * cost.teacher_weights if teacher_runs else 0,
        images=pixels * (1 + 4),
        loader=2 * (num_threads + 3) * pixels,  # of training and of validation
        checkpoint=3 * (weights + momentum + average) // 2 if saves else 0,  # the copy, and its file in free blocks
        heap=0 if on_gpu else round(HEAP_WASTE * (activations + transient)),
        libraries=IMPORTS + FIRST_STEP,
    )


class Spent(NamedTuple):
    """What has gone into a network, over its stage and those that it started from; not into its teacher's training."""

    epochs: int
    images: int
    macs: float


def spent(key: str, recipe: Recipe, num_classes: int, images_per_epoch: int) -> Spent:
    """Student epochs, images and multiply-adds up to the end of instance `key`, the teacher's included.

    Also where its outputs were stored: they are counted for every student, as if it had asked.
    """
    instance = recipe.instances[key]
    images = instance.stage.epochs * images_per_epoch
    before = spent(instance.init, recipe, num_classes, images_per_epoch) if instance.init else Spent(0, 0, 0.0)
    macs = images * training_macs(instance, recipe, num_classes).total
    return Spent(before.epochs + instance.stage.epochs, before.images + images, before.macs + macs)
