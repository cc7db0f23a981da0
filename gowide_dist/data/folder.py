"""A plain folder of class folders, read as validation images for a network: no encoding, by Pillow, as torchvision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

from gowide_dist.data.loader import Batch
from gowide_dist.data.preprocessing import Preprocessing
from gowide_dist.data.sources.image_folder import read_labelled_folder


class FolderImages:
    """Batches of the images in a folder, each cut as `Preprocessing` says. names: of the files, relative to the folder.

    Raises DataError if a class folder is none of the network's classes, or there are no images.
    """

    def __init__(self, folder: Path, preprocessing: Preprocessing, batch_size: int, num_threads: int) -> None:
        images = read_labelled_folder(folder, preprocessing.classes)
        self._paths, self._labels = [Path(images.items[index].path) for index in range(len(images))], images.labels
        self._pixels, self._batch_size = preprocessing.pixels, batch_size
        self.names = [str(path.relative_to(folder)) for path in self._paths]
        self.steps_per_epoch = math.ceil(len(images) / batch_size)
        self._threads = ThreadPool(num_threads)

    def batches(self) -> Iterator[Batch]:
        """All images once, in order. Raises DataError at one that cannot be decoded."""
        parts = [slice(start, start + self._batch_size) for start in range(0, len(self._paths), self._batch_size)]
        decoded = self._threads.map_async(self._pixels, self._paths[parts[0]])
        for part, following in zip(parts, [*parts[1:], slice(0, 0)], strict=True):
            images = torch.from_numpy(np.stack(decoded.get()))
            decoded = self._threads.map_async(self._pixels, self._paths[following])
            indices = torch.arange(len(self._paths))[part]
            yield Batch(images, torch.from_numpy(self._labels[part]), indices)

    def close(self) -> None:
        """End the threads."""
        self._threads.terminate()
        self._threads.join()
