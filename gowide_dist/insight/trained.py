"""A finished network of a run, with what it takes to use it: classes, normalisation, images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gowide_dist.data.decode import CenterCrop, Shift
from gowide_dist.data.info import DatasetInfo, check_split, read_dataset_info
from gowide_dist.data.loader import Loader
from gowide_dist.errors import DataError, RunError
from gowide_dist.networks.resnet import ResNet
from gowide_dist.pipeline import find_finished
from gowide_dist.recipe import Instance, Recipe
from gowide_dist.run import Done, Run
from gowide_dist.timeline import Batching
from gowide_dist.train.start import load_trained

BATCH_SIZE = 64


class Classifier(nn.Module):
    """A network on images as they lie in files: uint8 [B, H, H, 3] RGB -> logits [B, K]."""

    mean: Tensor  # [3, 1, 1], of pixels 0 to 255
    std: Tensor

    def __init__(self, network: ResNet, info: DatasetInfo) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", info.mean), ("std", info.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None] * 255)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        # What the network's pooling comes to; exported, that would leave a detour around the strides of its output.
        return cast(Tensor, self.network.fc(self.blocks(images)[-1].mean((2, 3))))

    def blocks(self, images: Tensor) -> tuple[Tensor, ...]:
        """Output of every block, [B, C_i, H_i, H_i]."""
        pixels = images.permute(0, 3, 1, 2).float()
        return self.network.blocks((pixels - self.mean) / self.std)


@dataclass(frozen=True)
class Trained:
    """A finished network of a run. info: of the images that it was trained on."""

    run: Run
    recipe: Recipe
    instance: Instance
    done: Done
    info: DatasetInfo
    val_checksum: str  # of the validation images that `done` speaks of

    def network(self) -> ResNet:
        """The network on the CPU, in eval mode."""
        return load_trained(self.instance, self.run, len(self.info.classes)).eval()

    def training_images(self, most: int) -> Loader:
        """At most so many training images, evenly from the whole file and not augmented."""
        data = self.recipe.data
        # Images that training crops to size at random need not have it.
        crop = data.center_crop or (1.0 if data.augment.crop else None)
        return _loader(data.train, data.resolution, crop, most)

    def validation_images(self, path: Path, most: int | None = None) -> Loader:
        """The images of an FFCV file as validation sees them; with `most` at most so many, evenly from the whole file.

        Raises DataError if the file has other classes than the network.
        """
        theirs, ours = read_dataset_info(path).classes, self.info.classes
        if theirs != ours:
            pairs = zip(theirs, ours, strict=False)
            first = next((f"class {i} is '{a}' there, '{b}' here" for i, (a, b) in enumerate(pairs) if a != b), None)
            differs = first or f"{len(theirs)} there, {len(ours)} here"
            raise DataError(f"{path}: other classes than {self.instance.key} of {self.run.path} knows: {differs}")
        data = self.recipe.data
        return _loader(path, data.resolution, data.center_crop, most)

    def is_own(self, path: Path) -> bool:
        """Whether an FFCV file holds the validation images that `done` speaks of."""
        return check_split(path).checksum == self.val_checksum


def open_trained(run: Path, name: str) -> Trained:
    """The finished network `name` (`stage` or `stage/network`) of a run.

    Raises UserError if there is none, or if its weights or the dataset that it was trained on have changed.
    """
    place = Run(run)
    stage, _, network = name.partition("/")
    recipe, instance, done = find_finished(place, stage, network or None)
    folder = place.stage(instance.key)
    folder.check_weights()
    identity = folder.read_identity()
    if identity is None:
        raise RunError(f"{folder.path}: not the weights that were trained; delete it to train {instance.key} again")
    info = read_dataset_info(recipe.data.train)
    checksums = {split.file: split.checksum for split in info.splits.values()}
    if checksums.get(recipe.data.train.name) != identity["data"]["train"]:
        raise DataError(
            f"{recipe.data.train}: not the images that {instance.key} was trained on, whose mean and spread it needs; "
            "encode them again as they were"
        )
    return Trained(place, recipe, instance, done, info, identity["data"]["val"])


def _loader(path: Path, resolution: int, center_crop: float | None, most: int | None) -> Loader:
    samples: NDArray[np.int64] | None = None
    if most is not None:
        num_samples = check_split(path).samples
        samples = np.linspace(0, num_samples - 1, min(most, num_samples)).round().astype(np.int64)
    return Loader(
        path,
        Batching(BATCH_SIZE),
        train=False,
        geometry=CenterCrop(center_crop) if center_crop else Shift(False, 0),
        samples=samples,
        resolution=resolution,
        num_threads=len(os.sched_getaffinity(0)),
    )
