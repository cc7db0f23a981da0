"""What stages cost, as PyTorch counts it: their real objectives take a step on the meta device.

Tensors have shapes there and no values, so that a step of any network takes a second and no memory. Whatever runs is
counted: linear transforms, frozen blocks, the teacher. Multiply-adds are counted once, as torchvision's tables do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from math import prod
from statistics import fmean
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gowide_dist.instances import Instance
from gowide_dist.networks.build import build_on, rehearsed
from gowide_dist.networks.foreign import Settings
from gowide_dist.networks.network import Network
from gowide_dist.networks.teacher import Teacher
from gowide_dist.recipe import Recipe
from gowide_dist.stages import Stage
from gowide_dist.timeline import Batching
from gowide_dist.train.context import COMPUTE_DTYPES
from gowide_dist.train.objectives import Objective, as_trained, build_objective

_IMAGES = 8  # of a batch where only multiply-adds are wanted
IMPORTS = 500_000_000  # bytes of PyTorch once it is loaded, about
FIRST_STEP = 115_000_000  # what comes with the first step: kernels, threads, logs
# On CPUs: bytes of heap without a tensor, for each byte of activations. glibc keeps freed blocks for the next step, and
# since each is aligned anew, few fit where one of their size was. Measured: 0.4 to 0.75, once 1.1.
HEAP_WASTE = 0.65
HOST_PARTS = ("loader", "checkpoint", "heap")  # parts of `memory_per_process` that take no memory of a GPU


class MacsPerImage(NamedTuple):
    """Multiply-adds for one image: of the student, forward and backward, and of the teacher."""

    forward: float
    backward: float
    teacher: float

    @property
    def total(self) -> float:
        return sum(self)


class NetworkCost(NamedTuple):
    """Trainable parameters, and multiply-adds of one image's forward pass."""

    parameters: int
    macs: float


class StageCost(NamedTuple):
    """What it costs to train a stage's objective, with a live teacher where it has one.

    Activations and transient: bytes of a batch in float32, in the phase that takes most memory.
    """

    macs: MacsPerImage  # averaged over the phases, which are equally long
    validation: MacsPerImage  # for one validation image
    weights: int  # parameters of the student and of what is trained with it
    trained: int  # the most of them that a phase trains
    teacher_weights: int
    activations: int  # what the forward pass keeps for the backward pass
    transient: int  # temporary tensors on top of that, such as the teacher's activations and gradients of activations


@cache
def network_cost(architecture: Settings, num_classes: int, resolution: int) -> NetworkCost:
    """Parameters and multiply-adds of a network for square images of side `resolution` px."""

    def count(device: torch.device) -> NetworkCost:
        network = build_on(device, architecture, num_classes).eval()
        images, _ = _batch(1, resolution, device)
        return NetworkCost(_num_parameters(network), _flops(lambda: network(images)) / 2)

    return rehearsed(count, [architecture])


def stage_cost(
    instance: Instance, recipe: Recipe, num_classes: int, *, side: int | None = None, num_images: int = _IMAGES
) -> StageCost:
    """The cost of training an instance on `num_images` images at once. side: px; default: the data's resolution."""
    teacher = recipe.instances[instance.teacher].architecture if instance.teacher else None
    side, num_images = side or recipe.data.resolution, max(2, num_images)  # batch norms refuse a single value
    return _count(instance.stage, instance.architecture, teacher, num_classes, side, num_images)


def training_macs(
    instance: Instance, recipe: Recipe, num_classes: int, *, num_images: int = _IMAGES, teacher_runs: bool = True
) -> MacsPerImage:
    """The cost of training on one image, averaged over the phases and, if images grow, the epochs of the stage.

    teacher_runs: False where its outputs are stored, or computed for another student.
    """
    stage, resolution = instance.stage, recipe.data.resolution
    sides = [stage.ramp.side(epoch, resolution) for epoch in range(stage.epochs or 1)] if stage.ramp else [resolution]
    macs = _mean(stage_cost(instance, recipe, num_classes, side=side, num_images=num_images).macs for side in sides)
    return macs if teacher_runs else macs._replace(teacher=0.0)


@cache
def _count(
    stage: Stage, student: Settings, taught_by: Settings | None, num_classes: int, side: int, num_images: int
) -> StageCost:
    def count(device: torch.device) -> StageCost:
        network = build_on(device, taught_by, num_classes) if taught_by else None
        learner = build_on(device, student, num_classes)
        return _count_on(device, stage, learner, network, side, num_images)

    return rehearsed(count, [student, taught_by])


def _count_on(
    device: torch.device, stage: Stage, learner: Network, network: Network | None, side: int, num_images: int
) -> StageCost:
    for each in (network, learner):
        if each:
            each.settle(side)
    learner.freeze_unused(side)
    with device:
        teacher = Teacher(network) if network else None
        objective = build_objective(stage, as_trained(learner, stage, side), teacher)
    images, labels = _batch(num_images, side, device)
    phases = [_count_phase(objective, teacher, phase, images, labels) for phase in range(objective.num_phases)]
    macs, trained, _, _ = zip(*phases, strict=True)
    _, _, activations, transient = max(phases, key=lambda phase: 8 * phase[1] + phase[2] + phase[3])
    objective.eval()
    with teacher.cached() if teacher else nullcontext():
        both = _flops(lambda: objective.evaluate(images, labels))
        known = _flops(lambda: objective.evaluate(images, labels)) if teacher else both
    return StageCost(
        _mean(macs),
        validation=MacsPerImage(*(flops / 2 / num_images for flops in (known, 0, both - known))),
        weights=_num_parameters(objective),
        trained=max(trained),
        teacher_weights=_num_parameters(network) if network else 0,
        activations=activations,
        transient=transient,
    )


def _count_phase(
    objective: Objective, teacher: Teacher | None, phase: int, images: Tensor, labels: Tensor
) -> tuple[MacsPerImage, int, int, int]:
    """Multiply-adds, trained parameters, and bytes: activations and transient."""
    objective.begin_phase(phase)
    objective.train()
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    for parameter in trained:  # counted by itself: here only what a step takes beside it
        parameter.grad = torch.empty_like(parameter)
    with teacher.cached() if teacher else nullcontext():
        with _flop_counter() as step, _LiveBytes() as live:
            loss = objective(images, labels)["loss"]
            forward, activations = step.get_total_flops(), live.bytes
            loss.backward()
        # here the teacher's outputs come from the cache
        student = _flops(lambda: objective(images, labels)) if teacher else forward
    flops = (student, step.get_total_flops() - forward, forward - student)
    macs = MacsPerImage(*(count / 2 / len(images) for count in flops))
    return macs, sum(parameter.numel() for parameter in trained), activations, live.peak - activations


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


def _batch(num_images: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.zeros(num_images, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return images, torch.zeros(num_images, dtype=torch.long, device=device)


def _conv_backward_flops(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *options: Any, **_: Any
) -> int:
    """Operations of a convolution's gradients. PyTorch's own formula counts those of grouped weights for all groups.

    Each of the two gradients, of x and of the weight, takes as many as the forward pass.
    """
    of_x, of_weight, _ = options[-1]
    return 2 * int(of_x + of_weight) * prod(weight) * gradient[0] * prod(gradient[2:])


def _flop_counter() -> FlopCounterMode:
    mapping = {torch.ops.aten.convolution_backward: _conv_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _flops(forward: Callable[[], Any]) -> float:
    """Operations: a multiply and an add are two."""
    with _flop_counter() as counter, torch.no_grad():
        forward()
    return float(counter.get_total_flops())


def _mean(costs: Iterable[MacsPerImage]) -> MacsPerImage:
    return MacsPerImage(*(fmean(values) for values in zip(*costs, strict=True)))


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
) -> dict[str, int]:
    """Bytes that a training process needs, by what needs them.

    num_threads: that decode its images. saves: whether checkpoints are written on the way. On top come half a GB of
    PyTorch's files, which all processes of a machine share, and the pages of the dataset that the system caches.
    """
    stage, optim = instance.stage, instance.stage.optim
    cost = stage_cost(instance, recipe, num_classes, num_images=batching.micro_batch)
    pixels = batching.local_batch * 3 * recipe.data.resolution**2
    itemsize = COMPUTE_DTYPES[recipe.precision].itemsize
    teacher = recipe.instances[instance.teacher] if instance.teacher and teacher_runs else None
    num_views = 2 if teacher and teacher.normalise != instance.normalise else 1
    activations, transient = (itemsize * (stage.epochs and n) // 4 for n in (cost.activations, cost.transient))
    weights, gradients = 4 * cost.weights, 4 * cost.trained if stage.epochs else 0
    optimizer = (gradients if optim and optim.momentum else 0) + (weights if optim and optim.ema else 0)
    return {
        "weights": weights,
        "gradients": gradients,  # of the parameters that a phase trains
        "optimizer": optimizer,  # momentum, and the moving average of the weights
        "activations": activations,  # of the images that a process takes at a time
        "transient": transient,
        "teacher": itemsize * cost.teacher_weights if teacher_runs else 0,
        "images": pixels * (1 + 4 * num_views),  # as bytes, and as input of student and teacher
        "loader": 2 * (num_threads + 3) * pixels,  # decoded batches that wait, of training and of validation
        "checkpoint": 3 * (weights + optimizer) // 2 if saves else 0,  # the copy, and its file in free blocks
        "heap": 0 if on_gpu else round(HEAP_WASTE * (activations + transient)),
        "libraries": IMPORTS + FIRST_STEP,
    }


def memory_together(memories: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Bytes that a process needs to train several students in one job, of those that it needs for each.

    Each keeps its own state; in a step one comes after the other.
    """
    kept = ("weights", "gradients", "optimizer", "checkpoint")
    return {part: (sum if part in kept else max)(memory[part] for memory in memories) for part in memories[0]}


class Spent(NamedTuple):
    """What has gone into a network, over its stage and those that it started from; not into its teacher's training."""

    epochs: int
    images: int
    macs: float


def spent(key: str, recipe: Recipe, num_classes: int, images_per_epoch: int) -> Spent:
    """Student epochs, images and multiply-adds up to the end of instance `key`, the teacher's included.

    Stored outputs are counted for every student as if the teacher had run for it.
    """
    instance = recipe.instances[key]
    images = instance.stage.epochs * images_per_epoch
    before = spent(instance.init, recipe, num_classes, images_per_epoch) if instance.init else Spent(0, 0, 0.0)
    macs = images * training_macs(instance, recipe, num_classes).total
    return Spent(before.epochs + instance.stage.epochs, before.images + images, before.macs + macs)
