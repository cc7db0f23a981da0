"""FFCV's own files."""

from pathlib import Path

import numpy as np

from gowide_dist.data.beton import read_foreign
from gowide_dist.data.sources import ImageList, SourceDataset, SplitName, names_of_classes
from gowide_dist.errors import DataError


def read_ffcv(root: Path) -> SourceDataset:
    """One file train*.beton or train*.ffcv and one val* (optional), as FFCV's DatasetWriter leaves them.

    Class names, which such files don't hold, are the lines of classes.txt in `root`, or else the labels' numbers.
    Raises DataError if a file is missing, damaged or contains anything other than images with labels.
    """
    splits: dict[SplitName, ImageList] = {}
    for name in ("train", "val"):
        paths = sorted(path for suffix in ("beton", "ffcv") for path in root.glob(f"{name}*.{suffix}"))
        if len(paths) > 1:
            listed = ", ".join(path.name for path in paths)
            raise DataError(f"{root}: {len(paths)} files for {name} ({listed}); leave one")
        for path in paths:
            images, labels = read_foreign(path)
            splits[name] = ImageList(images, labels)
    if "train" not in splits:
        raise DataError(f"{root}: no file train*.beton or train*.ffcv in it")
    all_labels = np.concatenate([split.labels for split in splits.values()])
    classes = names_of_classes(root / "classes.txt", all_labels)
    return SourceDataset(f"FFCV files in {root}", classes, splits)
