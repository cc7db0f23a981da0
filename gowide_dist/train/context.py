"""What every stage of a run trains with: recipe, run directory, processes and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gowide_dist.data.info import DatasetInfo
from gowide_dist.data.loader import Batch, Loader
from gowide_dist.identity import fingerprint
from gowide_dist.networks.network import Network
from gowide_dist.networks.normalise import DATASET, Channels, Normalise
from gowide_dist.recipe import Recipe
from gowide_dist.run import Run
from gowide_dist.stages import Stage
from gowide_dist.train.losses import Targets
from gowide_dist.train.teacher_logits import TeacherOutput
from gowide_dist.world import World, to_device

COMPUTE_DTYPES = {
    "float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


class TrainBatch(NamedTuple):
    """A batch on the device: images [B, 3, H, H], labels, and the teacher's output where it is stored."""

    images: Tensor
    labels: Targets
    stored: TeacherOutput | None

    def chunk(self, num_chunks: int) -> list[TrainBatch]:
        """The batch in equal parts."""
        stored = self.stored.chunk(num_chunks) if self.stored else [None] * num_chunks
        labels: Sequence[Targets] = self.labels.chunk(num_chunks)
        parts = zip(self.images.chunk(num_chunks), labels, stored, strict=True)
        return [TrainBatch(*part) for part in parts]


Views = Mapping[Normalise, TrainBatch]  # a batch as each normalisation among a stage's networks has it


def chunk(views: Views, num_chunks: int) -> list[Views]:
    """The batch in equal parts."""
    parts = zip(*(batch.chunk(num_chunks) for batch in views.values()), strict=True)
    return [dict(zip(views, part, strict=True)) for part in parts]


@dataclass(frozen=True)
class TrainData:
    """The data of a run, used by all of its stages: loaders, and how their pixels become a network's input.

    info: of the training images.
    """

    train: Callable[[int], Loader]  # a new one, for a seed
    val: Loader
    info: DatasetInfo
    device: torch.device

    @property
    def num_classes(self) -> int:
        return len(self.info.classes)

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 [B, H, H, 3], and labels [B], on the device."""
        return to_device(batch.images, self.device), to_device(batch.labels, self.device)

    def normalised(self, pixels: Tensor, normalise: Normalise = DATASET) -> Tensor:
        """Pixels as a network takes them that is normalised so: images [B, 3, H, H] float32 in channels_last."""
        moments = normalise.mean or self.info.mean, normalise.std or self.info.std
        mean, std = (_row(channels, pixels.shape[2], pixels.device) for channels in moments)
        images = pixels.flatten(2).float().sub_(mean).div_(std).view(pixels.shape)
        return images.permute(0, 3, 1, 2)  # NHWC in memory: channels_last


@cache
@torch.inference_mode(mode=False)
def _row(channels: Channels, width: int, device: torch.device) -> Tensor:
    """Of pixels 0 to 255, for a whole row of pixels, [3 * width]: CPUs take it three times as fast as channels."""
    return (torch.tensor(channels, device=device) * 255).repeat(width)


@dataclass(frozen=True)
class TrainContext:
    """What every stage of a run trains with. identities: of every stage instance, by key."""

    recipe: Recipe
    run: Run
    world: World
    data: TrainData
    identities: Mapping[str, Mapping[str, Any]]

    def fingerprint(self, key: str) -> str:
        return fingerprint(self.identities[key])

    def is_done(self, key: str) -> bool:
        return self.run.stage(key).is_done(self.fingerprint(key))

    def place(self, network: Network) -> Network:
        """A network on the device, its convolutions in channels_last."""
        return network.to(self.world.device).to(memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        return autocast(self.recipe.precision, self.world.device)


def configure_backends(recipe: Recipe, stage: Stage) -> None:
    """What PyTorch leaves to global switches, for a stage.

    By PyTorch's default float32 convolutions are TF32 on GPUs that have it, and matrix products are not: one word of
    the recipe decides on both. cuDNN tries its algorithms out once for each shape, which pays where shapes stay.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = recipe.precision == "tf32"
    torch.backends.cudnn.benchmark = stage.ramp is None or stage.ramp.is_constant


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Inside, convolutions compute in a precision of the recipe; weights stay float32."""
    dtype = COMPUTE_DTYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
