"""The plain way of teaching, as scripts have it: torchvision reads the images, networks are eager and in NCHW, and the
whole teacher runs on every batch.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from gowide_dist.data.beton import JPEG, Beton
from gowide_dist.instances import Instance
from gowide_dist.networks.normalise import Channels
from gowide_dist.networks.transforms import linear_transform
from gowide_dist.recipe import Recipe
from gowide_dist.stages import KlStage
from tests.bench.subject import OPTIM, Subject


class PlainImages(Dataset[tuple[Tensor, int]]):
    """A recipe's training images as torchvision's data sets give them: by Pillow, one by one, augmented and normalised.

    [3, H, H] float32, and the label. mean, std: of pixels / 255.
    """

    def __init__(self, recipe: Recipe, mean: Channels, std: Channels) -> None:
        side, augment = recipe.data.resolution, recipe.data.augment
        steps: list[Any] = []
        if augment.crop:
            steps.append(transforms.RandomResizedCrop(side, augment.crop.scale, augment.crop.ratio))
        elif augment.translate:
            steps.append(transforms.RandomCrop(side, padding=augment.translate))
        if augment.flip:
            steps.append(transforms.RandomHorizontalFlip())
        normalise = transforms.Normalize(mean, std)
        self._transform = transforms.Compose([*steps, transforms.ToTensor(), normalise])
        self._beton = Beton(recipe.data.train)

    def __len__(self) -> int:
        return len(self._beton)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        beton = self._beton
        start = beton.offsets[index]
        stored = beton.bytes[start : start + beton.sizes[index]]
        if beton.modes[index] == JPEG:
            image = Image.open(io.BytesIO(stored.tobytes())).convert("RGB")
        else:
            image = Image.fromarray(stored.reshape(beton.heights[index], beton.widths[index], 3))
        return self._transform(image), int(beton.labels[index])


def batches(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the device without end: images [B, 3, H, H] in NCHW and labels [B].

    For a GPU every core reads. On CPUs the training process reads: where all cores train, a step took longer still with
    workers beside it. (Where a core is idle they would be quicker.)
    """
    device = subject.world.device
    on_gpu = device.type == "cuda"
    loader = DataLoader(
        PlainImages(subject.recipe, subject.data.info.mean, subject.data.info.std),
        subject.recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=len(os.sched_getaffinity(0)) if on_gpu else 0,
        pin_memory=on_gpu,
    )
    while True:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def batches_in_memory(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """The same from a few batches that are there already."""
    return itertools.cycle([(images.contiguous(), labels) for images, labels in subject.inputs])


def imitation_steps(subject: Subject, instance: Instance) -> list[Callable[[Tensor, Tensor], None]]:
    """For each block a step that trains it, with hooks on both networks."""
    wide = subject.plain_network(subject.teacher_of(instance)).eval()
    thin = subject.plain_network(instance.architecture).train()
    seen: dict[str, Tensor] = {}
    for index in range(wide.num_blocks):
        wide.layer(index).register_forward_hook(lambda *call, name=f"wide{index}": seen.update({name: call[2]}))
    channels = zip(thin.architecture.block_channels, wide.architecture.block_channels, strict=True)
    ups = [linear_transform(*pair).to(subject.world.device) for pair in channels]

    def step_of(index: int) -> Callable[[Tensor, Tensor], None]:
        parts = [*thin.block_modules(index), ups[index]]
        parameters = [parameter for part in parts for parameter in part.parameters()]
        optimizer = torch.optim.SGD(parameters, OPTIM.lr, OPTIM.momentum)

        def step(images: Tensor, labels: Tensor) -> None:
            with subject.autocast():
                with torch.no_grad():
                    wide(images)
                output = ups[index](thin.blocks(images, index + 1)[-1])
                loss = F.mse_loss(output, seen[f"wide{index}"])
            loss.backward()
            optimizer.step()
            thin.zero_grad()

        return step

    return [step_of(index) for index in range(thin.num_blocks)]


def distillation_step(subject: Subject, instance: Instance) -> Callable[[Tensor, Tensor], None]:
    """A step of distillation with a live teacher."""
    stage = instance.stage
    assert isinstance(stage, KlStage)
    temperature, labels_weight = stage.temperature, stage.labels_weight
    wide = subject.plain_network(subject.teacher_of(instance)).eval()
    thin = subject.plain_network(instance.architecture).train()
    optimizer = torch.optim.SGD(thin.parameters(), OPTIM.lr, OPTIM.momentum, weight_decay=OPTIM.weight_decay)

    def step(images: Tensor, labels: Tensor) -> None:
        with subject.autocast():
            with torch.no_grad():
                teacher, _ = wide(images)
            student, _ = thin(images)
            log_student, log_teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
            divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
            loss = (1 - labels_weight) * temperature**2 * divergence + labels_weight * F.cross_entropy(student, labels)
        loss.backward()
        optimizer.step()
        thin.zero_grad()

    return step
