"""A finished network of a run with what using it needs: classes, normalisation, images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gowide_dist.data.beton import Beton
from gowide_dist.data.decode import CenterCrop, Geometry
from gowide_dist.data.folder import FolderImages
from gowide_dist.data.info import check_split, read_dataset_info
from gowide_dist.data.loader import Batch, Loader, geometry_of
from gowide_dist.data.preprocessing import Preprocessing
from gowide_dist.errors import DataError
from gowide_dist.instances import Instance
from gowide_dist.machine import num_cores
from gowide_dist.networks.network import Network
from gowide_dist.pipeline import find_finished, preprocessing_of
from gowide_dist.progress import track
from gowide_dist.recipe import Recipe
from gowide_dist.run import Done, Run
from gowide_dist.timeline import Batching
from gowide_dist.train.start import load_trained

BATCH_SIZE = 64
Samples: TypeAlias = NDArray[np.int64]  # numbers of images in a file


class Images(Protocol):
    """Images to go through once: a Loader, or what takes its place."""

    @property
    def steps_per_epoch(self) -> int: ...
    def batches(self) -> Iterator[Batch]: ...


class Classifier(nn.Module):
    """A network with its normalisation: uint8 images [B, H, H, 3] (RGB), as decoded from a file -> logits [B, K]."""

    mean: Tensor  # [3, 1, 1], of pixels 0 to 255
    std: Tensor

    def __init__(self, network: Network, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None] * 255)

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images)[0]

    def outputs(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits, and the output of every block, [B, C_i, H_i, H_i], of a network of ours."""
        pixels = images.permute(0, 3, 1, 2).float()
        return cast(tuple[Tensor, tuple[Tensor, ...]], self.network((pixels - self.mean) / self.std))


@dataclass(frozen=True)
class Trained:
    """A finished network of a run."""

    run: Run
    recipe: Recipe
    instance: Instance
    done: Done
    preprocessing: Preprocessing
    train_checksum: str  # of the images that it was trained on,
    val_checksum: str  # and of the validation images whose accuracies `done` holds

    def network(self) -> Network:
        """The network on the CPU, in eval mode. Raises RunError if its weights have changed."""
        return load_trained(self.instance, self.run, len(self.preprocessing.classes)).eval()

    def training_images(self, path: Path, limit: int) -> Loader:
        """About `limit` images of an FFCV file of training images, not augmented: as many of each class, at least one.

        Those of a class are evenly spaced over the file; a class with fewer images gives all it has.
        """
        data = self.recipe.data
        is_any_size = data.augment.crop and not data.center_crop  # validation images alone have the recipe's resolution
        geometry = CenterCrop(1.0) if is_any_size else geometry_of(data, train=False)
        return self._images(path, geometry, balanced_samples(Beton(path).labels, limit))

    def validation_images(self, path: Path, limit: int | None = None) -> Loader:
        """The images of an FFCV file, cut as for validation: all, or at most `limit`, evenly spaced over the file.

        Of another size than the recipe's, they are resized and their middle is cut out.

        Raises DataError if the file is not there or has other classes than the network.
        """
        if path == self.recipe.data.val and not path.exists():
            raise DataError(f"{path}: not found here; `gowide eval` takes other images by --data or --images")
        data = self.recipe.data
        is_cut = data.center_crop or read_dataset_info(path).fixed_side_px == data.resolution
        samples = evenly_spaced(np.arange(check_split(path).samples), limit)
        return self._images(path, geometry_of(data, train=False) if is_cut else CenterCrop(1.0), samples)

    def folder_images(self, folder: Path) -> FolderImages:
        """The images of a folder of class folders. Raises DataError if it has other classes than the network."""
        return FolderImages(folder, self.preprocessing, BATCH_SIZE, num_cores())

    def _images(self, path: Path, geometry: Geometry, samples: Samples) -> Loader:
        pairs = zip_longest(read_dataset_info(path).classes, self.preprocessing.classes, fillvalue="missing")
        for label, (name, expected) in enumerate(pairs):
            if name != expected:
                other = f"class {label} is '{name}' instead of '{expected}'"
                raise DataError(f"{path}: other classes than those of {self.instance.key} in {self.run.path}: {other}")
        side, cores = self.recipe.data.resolution, num_cores()
        load = partial(Loader, path, Batching(BATCH_SIZE), train=False, resolution=side)
        return load(geometry=geometry, samples=samples, num_threads=cores)


def evenly_spaced(samples: Samples, limit: int | None) -> Samples:
    """All samples [N], or `limit` of them."""
    count = len(samples)
    return samples[np.linspace(0, count - 1, min(limit or count, count)).round().astype(np.int64)]


def balanced_samples(labels: Samples, limit: int) -> Samples:
    """Samples of a file by the labels [N] of all, in order: of each class that has some, limit / K, at least one."""
    classes = np.unique(labels)
    each = max(1, limit // len(classes))
    return np.sort(np.concatenate([evenly_spaced(np.flatnonzero(labels == label), each) for label in classes]))


def open_trained(path: Path, name: str) -> Trained:
    """The finished network `name` (`stage` or `stage/network`) of the run at `path`; the run's folder is enough.

    Raises UserError if there is none.
    """
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))  # of quotas PyTorch knows nothing
    run = Run(path)
    stage, _, network = name.partition("/")
    recipe, instance, done = find_finished(run, stage, network or None)
    identity = run.stage(instance.key).read_identity()
    assert identity is not None, "without one no stage is finished"
    checksums = (identity["data"][split] for split in ("train", "val"))
    return Trained(run, recipe, instance, done, preprocessing_of(run, recipe, instance), *checksums)


@torch.inference_mode()
def predict(forward: Callable[[Tensor], Tensor], images: Images, name: str) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and labels [N] of all images, on the CPU, from a function of uint8 images [B, H, H, 3]."""
    batches = track(images.batches(), name, images.steps_per_epoch, "batches")
    logits, labels = zip(*((forward(batch.images).cpu(), batch.labels) for batch in batches), strict=True)
    return torch.cat(logits), torch.cat(labels)
