"""Fashion-MNIST's idx files."""

from pathlib import Path

import numpy as np

from gowide_dist.data.idx import read_idx
from gowide_dist.data.sources import ImageList, SourceDataset, SplitName
from gowide_dist.errors import DataError

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def read_fashion_mnist(root: Path) -> SourceDataset:
    """Four idx files, gzipped or not. Raises DataError if one is missing or damaged."""
    if not root.is_dir():
        raise DataError(f"{root}: not found; run `apt install dataset-fashion-mnist` or give --root")
    prefixes: dict[SplitName, str] = {"train": "train", "val": "t10k"}
    splits: dict[SplitName, ImageList] = {}
    for split, prefix in prefixes.items():
        images = read_idx(root / f"{prefix}-images-idx3-ubyte", 3)
        labels = read_idx(root / f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise DataError(f"{root}: {len(images):,} images but {len(labels):,} labels in the files {prefix}-*")
        if labels.max() >= len(FASHION_MNIST_CLASSES):
            raise DataError(f"{root}/{prefix}-labels-idx1-ubyte: label {labels.max()}; the classes are 0 to 9")
        splits[split] = ImageList(images, labels.astype(np.int64))
    return SourceDataset(f"Fashion-MNIST from {root}", FASHION_MNIST_CLASSES, splits)
