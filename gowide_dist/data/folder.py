"""A plain folder of class folders, read as validation images for a network: no encoding, by Pillow, as torchvision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch

from gowide_dist.data.images import Pixels
from gowide_dist.data.loader import Batch
from gowide_dist.data.preprocessing import Preprocessing
from gowide_dist.data.sources import listed
from gowide_dist.data.sources.image_folder import read_labelled_folder
from gowide_dist.data.tally import check_peak
from gowide_dist.errors import DataError


class FolderImages:
    """Batches of the images in a folder, each cut as `Preprocessing` says. names: of the files, relative to the folder.

    Raises DataError if a class folder is none of the network's classes, or there are no images.
    """

    def __init__(self, folder: Path, preprocessing: Preprocessing, batch_size: int, num_threads: int) -> None:
        images = read_labelled_folder(folder, preprocessing.classes)
        self._paths, self._labels = [Path(images.items[index].path) for index in range(len(images))], images.labels
        self._folder, self._preprocessing, self._batch_size = folder, preprocessing, batch_size
        self._peaks: list[int] = []  # the highest values of the images of 16 bits
        self.names = [str(path.relative_to(folder)) for path in self._paths]
        self.steps_per_epoch = math.ceil(len(images) / batch_size)
        self._threads = ThreadPool(num_threads)

    def batches(self) -> Iterator[Batch]:
        """All images once, in order.

        Raises DataError at those that cannot be decoded, and in the end if images of 16 bits were dark.
        """
        parts = [slice(start, start + self._batch_size) for start in range(0, len(self._paths), self._batch_size)]
        decoded = self._threads.map_async(self._prepare, self._paths[parts[0]])
        for part, following in zip(parts, [*parts[1:], slice(0, 0)], strict=True):
            prepared = decoded.get()
            decoded = self._threads.map_async(self._prepare, self._paths[following])
            if bad := {
                index: image for index, image in enumerate(prepared, part.start) if isinstance(image, DataError)
            }:
                first, *others = bad
                more = f"; {len(others)} more are damaged: {listed([self.names[index] for index in others])}"
                raise DataError(f"{bad[first]}{more if others else ''}")
            indices = torch.arange(len(self._paths))[part]
            images = np.stack([image for image in prepared if not isinstance(image, DataError)])
            yield Batch(torch.from_numpy(images), torch.from_numpy(self._labels[part]), indices)
        if self._preprocessing.bits is None:
            option = "the network's own images had no --bits; encode these with --bits {} and give them as --data"
            check_peak(len(self._peaks), max(self._peaks, default=0), option, f"{self._folder}: ")

    def _prepare(self, path: Path) -> Pixels | DataError:
        """What the network sees of an image, or why it cannot be decoded."""
        try:
            decoded = self._preprocessing.decode(path)
        except DataError as error:
            return error
        if decoded.peak:
            self._peaks.append(decoded.peak)
        return self._preprocessing.pixels(decoded.pixels)

    def close(self) -> None:
        """End the threads."""
        self._threads.terminate()
        self._threads.join()
