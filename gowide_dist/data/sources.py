"""Datasets in their usual form on disk: their images and labels. The layouts are torchvision's, and FFCV's files."""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.beton import read_foreign
from gowide_dist.data.idx import read_idx
from gowide_dist.data.order import draws
from gowide_dist.errors import DataError
from gowide_dist.schema import nearest

SplitName: TypeAlias = Literal["train", "val", "test"]

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
MANY_CLASSES = 20  # with more, an error names a few
MAX_UNNAMED_CLASSES = 1_000_000  # beyond, labels are more likely damaged than meant
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class ImageList:
    """A split: pixels uint8 [N, H, W] or [N, H, W, 3], or objects [N] (paths or StoredImages); labels int64 [N]."""

    items: NDArray[Any]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Any) -> "ImageList":
        """The images of a slice, of indices (int64 [M], in that order) or of a mask (bool [N])."""
        return ImageList(self.items[index], self.labels[index])


@dataclass(frozen=True)
class SourceDataset:
    """The dataset to encode. classes: names in the order of the labels."""

    description: str
    classes: tuple[str, ...]
    splits: dict[SplitName, ImageList]


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


def read_cifar(root: Path, num_classes: Literal[10, 100]) -> SourceDataset:
    """CIFAR's pickles for Python, in `root` or its usual sub-folder. Raises DataError as read_fashion_mnist does."""
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


def read_image_folder(root: Path) -> SourceDataset:
    """Folders train/ and val/ (optional) of class folders, as ImageNet's; links are followed.

    Every file that is not hidden counts as an image, at any depth. Training images are shuffled, so that a page of the
    FFCV file holds many classes. Raises DataError for missing or empty folders and for classes that only val/ has.
    """
    train, val = root / "train", root / "val"
    if not train.is_dir():
        raise DataError(f"{train}: not found; images go into {root}/train/CLASS/ and {root}/val/CLASS/")
    classes = _class_names(train)
    images = _list_images(train, classes)
    if empty := sorted(set(range(len(classes))) - set(images.labels.tolist())):
        names = ", ".join(classes[label] for label in empty[:5])
        raise DataError(f"{train}: {len(empty)} class folders without images ({names}); remove or fill them")
    splits: dict[SplitName, ImageList] = {"train": images.take(np.argsort(draws(np.uint64(0), len(images))))}
    if val.is_dir():
        if unknown := sorted(set(_class_names(val)) - set(classes)):
            raise DataError(f"{val}: class folder {unknown[0]} has no counterpart in {train}")
        splits["val"] = _list_images(val, classes)
        if not len(splits["val"]):
            raise DataError(f"{val}: no images; fill it, or remove it and use --held-out")
    return SourceDataset(f"image folder {root}", classes, splits)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folders in it")
    return tuple(names)


def _list_images(folder: Path, classes: tuple[str, ...]) -> ImageList:
    def fail(error: OSError) -> None:  # os.walk would pass over a folder that it cannot read
        raise error

    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue  # the validation split need not have every class
        for parent, folders, files in os.walk(folder / name, onerror=fail, followlinks=True):
            folders.sort()
            paths += [Path(parent, file) for file in sorted(files) if not file.startswith(".")]
        labels += [label] * (len(paths) - len(labels))
    return ImageList(np.fromiter(paths, object), np.array(labels, np.int64))


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
            splits[name] = ImageList(np.fromiter(images, object), labels)
    if "train" not in splits:
        raise DataError(f"{root}: no file train*.beton or train*.ffcv in it")
    all_labels = np.concatenate([split.labels for split in splits.values()])
    lowest, highest = int(all_labels.min()), int(all_labels.max())
    file = root / "classes.txt"
    if file.exists():
        classes = tuple(file.read_text(errors="replace").splitlines())
    elif highest > MAX_UNNAMED_CLASSES:
        raise DataError(f"{root}: labels up to {highest:,}; name that many classes in {file}, or fix the labels")
    else:
        classes = tuple(map(str, range(highest + 1)))
    if lowest < 0 or highest >= len(classes):
        raise DataError(f"{root}: labels {lowest} to {highest}, but {len(classes):,} classes; fix {file}")
    return SourceDataset(f"FFCV files in {root}", classes, splits)


def stratified(labels: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Choose `count` samples, stratified by class: bool [N]. The same labels give the same choice."""
    by_draw = draws(np.uint64(0), len(labels))
    by_class = np.lexsort((by_draw, labels))
    sizes = np.bincount(labels)
    ranks = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of each image in its class
    by_fraction = by_class[np.lexsort((by_draw[by_class], (ranks + 0.5) / np.repeat(sizes, sizes)))]
    mask = np.zeros(len(labels), np.bool_)
    mask[by_fraction[:count]] = True
    return mask


def read_labelled_folder(folder: Path, classes: tuple[str, ...]) -> ImageList:
    """The images of class folders, labelled by the folders' names; any of `classes` may be absent.

    Raises DataError for a folder that is none of them, and if there are no images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; it should hold a folder of images for each class")
    if unknown := [name for name in _class_names(folder) if name not in classes]:
        known = nearest(unknown[0], classes) if len(classes) <= MANY_CLASSES else f"such as {', '.join(classes[:3])}"
        raise DataError(
            f"{folder}: class folder {unknown[0]} is none of the network's {len(classes):,} classes, {known}"
        )
    if not len(images := _list_images(folder, classes)):
        raise DataError(f"{folder}: no images in its class folders")
    return images
