"""CIFAR-10 and CIFAR-100: the Python version's pickles, read without executing what they ask for."""

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.sources import ImageList, SourceDataset, SplitName
from gowide_dist.errors import DataError


def read_cifar(root: Path, num_classes: Literal[10, 100]) -> SourceDataset:
    """CIFAR's pickles for Python, in `root` or its usual sub-folder. Raises DataError if one is missing or damaged."""
    if num_classes == 10:
        files: dict[SplitName, list[str]] = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
        folder, labels_key, meta, names_key = "cifar-10-batches-py", "labels", "batches.meta", "label_names"
    else:
        files = {"train": ["train"], "val": ["test"]}
        folder, labels_key, meta, names_key = "cifar-100-python", "fine_labels", "meta", "fine_label_names"
    root = root / folder if (root / folder).is_dir() else root
    classes = tuple(map(str, _read_pickle(root / meta, names_key)[names_key]))
    if len(classes) != num_classes:
        raise DataError(f"{root / meta}: {len(classes)} classes instead of {num_classes}")
    splits: dict[SplitName, ImageList] = {}
    for split, names in files.items():
        parts = [_read_cifar_file(root / name, labels_key, num_classes) for name in names]
        splits[split] = ImageList(*map(np.concatenate, zip(*parts, strict=True)))
    return SourceDataset(f"CIFAR-{num_classes} from {root}", classes, splits)


def _read_cifar_file(path: Path, labels_key: str, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = _read_pickle(path, "data", labels_key)
    pixels, labels = content["data"], np.asarray(content[labels_key])
    shaped = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072)
    if not shaped or not len(labels):
        raise DataError(f"{path}: not CIFAR images of 3,072 bytes with a label each; get the file again")
    if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{path}: labels outside of 0 to {num_classes - 1}; get the file again")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays and plain values; refuses a pickle that would call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        is_array = module.startswith("numpy") and name in {"_reconstruct", "ndarray", "dtype"}
        if not is_array and (module, name) != ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_pickle(path: Path, *keys: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"{path}: not found; give the folder of CIFAR's python version as --root") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path}: cannot be read ({error}); get the file again") from None
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise DataError(f"{path}: no {' or '.join(keys)} in it; get the file again")
    return content
