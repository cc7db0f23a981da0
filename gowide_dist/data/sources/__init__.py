"""Datasets in their usual form on disk: their images, listed but not read, and labels. One file a layout.

Where a layout has names for its images, they come in the order of (class, name), training images shuffled from there:
the same images give the same files, however they lie on disk.
"""

import os
import re
import struct
from array import array
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.order import draws
from gowide_dist.errors import DataError
from gowide_dist.progress import say

SplitName: TypeAlias = Literal["train", "val", "test"]

SPLIT_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing"),
}  # fmt: skip
MAX_UNNAMED_CLASSES = 1_000_000  # beyond, labels are more likely damaged than meant
UNKNOWN_SIZE = -1
_WHOLE_FILE = -1  # an offset
_NUM_SHOWN = 3  # of a long list of names


class Items(Protocol):
    """What an ImageList holds: an array of pixels, or images that are listed and not read yet."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


@runtime_checkable
class Packed(Items, Protocol):
    """Images in files that can only be read from their start."""

    def unpack(self, folder: Path) -> "FileList": ...


@dataclass(frozen=True)
class ImageList:
    """A split: pixels uint8 [N, H, W] or [N, H, W, 3], or a list [N] of images to read; labels int64 [N]."""

    items: Items
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Any) -> "ImageList":
        """The images of a slice, of indices (int64 [M], in that order) or of a mask (bool [N])."""
        return ImageList(self.items[index], self.labels[index])

    def unpacked(self, folder: Path) -> "ImageList":
        """The same images in files that can be read in any order, for which `folder` takes what has to be unpacked."""
        return ImageList(self.items.unpack(folder), self.labels) if isinstance(self.items, Packed) else self

    def shuffled(self) -> "ImageList":
        """In an order that depends on the number of images alone: a page of the FFCV file then has many classes."""
        return self.take(np.argsort(draws(np.uint64(0), len(self))))


@dataclass(frozen=True)
class SourceDataset:
    """The dataset to encode. classes: names in the order of the labels."""

    description: str
    classes: tuple[str, ...]
    splits: dict[SplitName, ImageList]


class FileImage(NamedTuple):
    """An encoded image: a file of `size` bytes, or the part of a file from `offset` on, where the image is `name`.

    origin: the file that this one was unpacked from, if it was.
    """

    path: str
    name: str
    offset: int
    size: int
    mtime_ns: int
    origin: str = ""

    def __str__(self) -> str:
        return self.path if self.offset == _WHOLE_FILE else f"{self.origin or self.path}: {self.name}"

    def read(self) -> bytes:
        """The image's bytes. Raises OSError if it cannot be read, ValueError if it is no regular file."""
        path = Path(self.path)
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")  # a pipe would be waited for, for ever
        with path.open("rb") as file:
            if self.offset == _WHOLE_FILE:
                return file.read()
            file.seek(self.offset)
            return file.read(self.size)


_ROW = np.dtype(
    [("place", "<i4"), ("name", "<i8"), ("length", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("mtime_ns", "<i8")]
)


_PACKED_ROW = struct.Struct("<iqiqqq")


@dataclass(frozen=True)
class FileList:
    """Images in files, in columns: as objects, a million of them would take a gigabyte.

    places: folders, or files that hold many images. names: all names in one string. rows: of _ROW [N]. origins: of the
    places, if those are unpacked.
    """

    places: list[str]
    names: bytes
    rows: NDArray[np.void]
    origins: list[str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> FileImage: ...
    @overload
    def __getitem__(self, index: NDArray[Any] | slice) -> "FileList": ...
    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int | np.integer):
            return replace(self, rows=self.rows[index])
        place, start, length, offset, size, mtime_ns = self.rows[index].item()
        path, name = self.places[place], os.fsdecode(self.names[start : start + length])
        path = os.path.join(path, name) if offset == _WHOLE_FILE else path  # noqa: PTH118
        return FileImage(path, name, offset, size, mtime_ns, self.origins[place] if self.origins else "")


class Lister:
    """Collects the images of a split, in any order, and makes a FileList of them in the order of (label, name)."""

    def __init__(self) -> None:
        self._places: list[str] = []
        self._names = bytearray()
        self._rows = bytearray()  # of _ROW
        self._labels = array("q")

    def __len__(self) -> int:
        return len(self._labels)

    def place(self, path: str | PurePath) -> None:
        """The folder or file of the images that follow."""
        self._places.append(str(path))

    def add(self, name: str, label: int, size: int, mtime_ns: int, offset: int = _WHOLE_FILE) -> None:
        encoded = os.fsencode(name)
        self._rows += _PACKED_ROW.pack(len(self._places) - 1, len(self._names), len(encoded), offset, size, mtime_ns)
        self._names += encoded
        self._labels.append(label)

    def finish(self, relabel: NDArray[np.int64] | None = None) -> ImageList:
        """relabel: the label for each number that was given as one."""
        labels = np.array(self._labels, np.int64)
        labels = labels if relabel is None else relabel[labels]
        files = FileList(self._places, bytes(self._names), np.frombuffer(self._rows, _ROW))
        order = np.argsort(labels, kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
            same[:] = sorted(same.tolist(), key=lambda row: _sort_key(files, row))
        return ImageList(files[order], labels[order])


def _sort_key(files: FileList, row: int) -> tuple[str, str, str]:
    """By the name without its suffix, which archives may lack; then by what tells two of a name apart."""
    place, name = files.places[files.rows["place"][row]], files[row].name
    return PurePath(name).stem, place, name


def label_of_texts(texts: list[str], classes: tuple[str, ...] | None, where: str) -> tuple[tuple[str, ...], list[int]]:
    """Classes and labels [N] of labels as text [N]: names of classes, or numbers from 0. classes: where known.

    Raises DataError, which says `where`, for texts that are neither.
    """
    if classes is None:
        numbers = all(text.isdecimal() for text in texts)
        classes = tuple(map(str, range(1 + max(map(int, texts))))) if numbers else tuple(sorted(set(texts)))
    index = {name: label for label, name in enumerate(classes)}
    if all(text in index for text in texts):
        return classes, [index[text] for text in texts]
    if all(text.isdecimal() for text in texts) and "0" in texts and max(map(int, texts)) < len(classes):
        return classes, [int(text) for text in texts]
    unknown = next(text for text in texts if text not in index)
    hint = ", and numbers have to count from 0" if unknown.isdecimal() else ""
    raise DataError(f"{where}: label {unknown} is none of the {len(classes):,} classes of the training images{hint}")


def names_of_classes(file: Path, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """The lines of `file` in the order of the labels, or else the labels' numbers. Raises DataError if they differ."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise DataError(f"{file.parent}: labels down to {lowest}; they have to count from 0")
    if file.exists():
        classes = tuple(file.read_text(errors="replace").splitlines())
    elif highest > MAX_UNNAMED_CLASSES:
        raise DataError(f"{file.parent}: labels up to {highest:,}; name that many classes in {file}, or fix the labels")
    else:
        classes = tuple(map(str, range(highest + 1)))
    if highest >= len(classes):
        raise DataError(f"{file.parent}: labels {lowest} to {highest}, but {len(classes):,} classes; fix {file}")
    return classes


def classes_of_texts(numbers: dict[str, int], classes_file: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Classes of the labels in `numbers`, and the label for each number. They are numbers themselves, or names."""
    if all(text.lstrip("-").isdecimal() for text in numbers):
        relabel = np.array([int(text) for text in numbers], np.int64)
        return names_of_classes(classes_file, relabel), relabel
    classes = tuple(sorted(numbers))
    return classes, np.array([classes.index(text) for text in numbers], np.int64)


def shard_files(root: Path, suffix: str) -> dict[SplitName, list[Path]]:
    """Files of a suffix in `root` and its split folders, by the split that their paths name; without any, all train."""
    usual = {name for names in SPLIT_NAMES.values() for name in names}
    folders = [root, *(path for path in root.iterdir() if path.name.lower() in usual and path.is_dir())]
    files = sorted(path for folder in folders for path in folder.glob(f"*.{suffix}") if not path.name.startswith("."))
    splits: dict[SplitName, list[Path]] = {}
    unnamed: list[Path] = []
    for path in files:
        words = re.findall(r"[a-z]+", str(path.relative_to(root)).lower())
        split = next((split for split, names in SPLIT_NAMES.items() if {*names} & {*words}), None)
        (splits.setdefault(split, []) if split else unnamed).append(path)
    _check_complete(files)
    if unnamed and not splits:
        return {"train": unnamed}
    say_left_out(root, [path.name for path in unnamed], "their names tell no split")
    return splits


def _check_complete(files: list[Path]) -> None:
    """Raises DataError if one of several files is missing, as far as names such as train-00003-of-00008 tell."""
    parts: dict[tuple[str, str], set[int]] = {}
    for path in files:
        if match := re.search(r"(.*?)(\d+)-of-(\d+)", str(path)):
            parts.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (start, total), numbers in parts.items():
        first = int(int(total) in numbers)  # some count from 1
        if missing := sorted(set(range(first, first + int(total))) - numbers):
            name = f"{start}{missing[0]:0{len(total)}}-of-{total}"
            raise DataError(f"{name}: missing, as {len(missing):,} of {int(total):,} files are; get the rest")


def listed(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - _NUM_SHOWN:,} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more


def contents(folder: Path) -> str:
    """What there is in a folder, for an error about what is not."""
    if not folder.is_dir():
        return "there is no such folder"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return f"there are {listed(names)}" if names else "it is empty"


def say_left_out(where: object, names: list[str], what: str = "no images by their names") -> None:
    """A note about files and folders that an encode leaves out."""
    if names:
        say(f"note: {where}: left out {len(names):,} ({what}): {listed(names)}")


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
