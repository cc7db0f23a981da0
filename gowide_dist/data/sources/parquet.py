"""Parquet files as Hugging Face's datasets writes them: `image` with `bytes` (and `path`), and `label`."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.sources import (
    FileList,
    ImageList,
    Lister,
    SourceDataset,
    SplitName,
    classes_of_texts,
    contents,
    listed,
    shard_files,
)
from gowide_dist.errors import DataError
from gowide_dist.progress import say, track

_IMAGES, _LABELS = ("image", "img", "jpg", "image.bytes"), ("label", "labels", "cls", "fine_label")
_UNPACKED = "unpacked"  # folder
_UNLABELLED = "-1"
_ROWS = 64  # that are in memory at a time


def parquet_files(root: Path) -> dict[SplitName, list[Path]]:
    """The files of each split."""
    return shard_files(root, "parquet")


@dataclass(frozen=True)
class ParquetImages:
    """Images in parquet files. files: as offset the number of the row. column: of the bytes."""

    files: FileList
    column: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        """A FileImage by its number, else ParquetImages."""
        return self.files[index] if isinstance(index, int) else replace(self, files=self.files[index])

    def unpack(self, folder: Path) -> FileList:
        """The images in files in `folder`, which take as much space as the parquet files: for images in any order.

        Those without a name get the number of their row.
        """
        rows, names, places = self.files.rows.copy(), bytearray(self.files.names), []
        for row in np.flatnonzero(rows["length"] == 0):
            name = f"row {rows['offset'][row]}".encode()
            rows["name"][row], rows["length"][row] = len(names), len(name)
            names += name
        for number, place in enumerate(track(self.files.places, "unpacking parquet", len(self.files.places), "files")):
            path, starts = _unpack(Path(place), self.column, folder / _UNPACKED)
            places.append(str(path))
            own = rows["place"] == number
            row = rows["offset"][own]
            rows["offset"][own], rows["size"][own] = starts[row], starts[row + 1] - starts[row]
        return FileList(places, bytes(names), rows, origins=self.files.places)


def read_parquet(root: Path) -> SourceDataset:
    """Files in `root` or its folders, whose paths name their split. Class names are in the files, or in classes.txt.

    Images with a path in the files come in its order, others as they are. Raises DataError if pyarrow, which reads the
    files, is not installed, and for files that are damaged or have no images and labels.
    """
    splits: dict[SplitName, ImageList] = {}
    numbers: dict[str, int] = {}
    listers: dict[SplitName, Lister] = {}
    names: tuple[str, ...] | None = None
    column = ""
    for split, paths in parquet_files(root).items():
        listers[split] = Lister()
        for path in paths:
            own_column, labels, images, own_names = _read_columns(path)
            if names and own_names and own_names != names:
                raise DataError(f"{path}: its class names, or their order, are not those of the files before it")
            names = names or own_names
            if column not in ("", own_column):
                raise DataError(f"{path}: its images are in {own_column}, those of other files in {column}")
            column = own_column
            if split == "test" and set(labels) == {_UNLABELLED}:
                continue
            if unlabelled := labels.count(_UNLABELLED):
                first = labels.index(_UNLABELLED)
                raise DataError(f"{path}: {unlabelled:,} of {len(labels):,} rows have no label, first row {first}")
            listers[split].place(path)
            mtime_ns = path.stat().st_mtime_ns
            for row, (label, name) in enumerate(zip(labels, images, strict=True)):
                number = numbers.setdefault(label, len(numbers))
                listers[split].add(name, number, 0, mtime_ns, offset=row)
    if "train" not in listers:
        raise DataError(f"{root}: no files train*.parquet in it ({contents(root)})")
    if names is None:
        classes, relabel = classes_of_texts(numbers, root / "classes.txt")
    else:
        classes, relabel = names, np.array([int(text) for text in numbers], np.int64)
        if relabel.min() < 0 or relabel.max() >= len(names):
            raise DataError(f"{root}: labels {relabel.min()} to {relabel.max()}, but {len(names):,} classes")
    for split, lister in listers.items():
        if not len(lister):
            say(f"note: {root}: the labels of {split} are -1: left out")
            continue
        rows = lister.finish(relabel)
        assert isinstance(rows.items, FileList)
        splits[split] = ImageList(ParquetImages(rows.items, column), rows.labels)
    splits["train"] = splits["train"].shuffled()
    return SourceDataset(f"parquet files in {root}", classes, splits)


def _open(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: reading it needs pyarrow: pip install 'gowide_dist[datasets]'") from None
    return _reading(path, lambda: ParquetFile(path))


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns. Raises DataError if the file is damaged."""
    from pyarrow import ArrowException

    try:
        return read()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}); get the file again") from None


def _children(kind: Any) -> list[Any]:
    """The fields of a struct; none of another type."""
    return [kind.field(number) for number in range(kind.num_fields)]


def _read_columns(path: Path) -> tuple[str, list[str], list[str], tuple[str, ...] | None]:
    """The column of the bytes, the labels as text [N], the images' names or "" [N], the names of the classes if any."""
    file = _open(path)
    schema = file.schema_arrow
    image = next((name for name in _IMAGES if name in schema.names), None)
    label = next((name for name in _LABELS if name in schema.names), None)
    children = [] if image is None else [child.name for child in _children(schema.field(image).type)]
    if image is None or label is None or (children and "bytes" not in children):
        raise DataError(f"{path}: has columns {listed(schema.names)}, and not `image` with bytes and `label`")
    if not str(kind := schema.field(label).type).removeprefix("large_").startswith(("int", "uint", "string", "dict")):
        raise DataError(f"{path}: its column {label} is {kind}; one whole number or one text for each image is needed")
    columns = [label, *([f"{image}.path"] if "path" in children else [])]
    table = _reading(path, lambda: file.read(columns))
    labels = [_UNLABELLED if value is None else str(value) for value in table[label].to_pylist()]
    paths = [row and row["path"] for row in table[image].to_pylist()] if "path" in children else [None] * len(labels)
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(label, {}).get("names")
    return (
        f"{image}.bytes" if children else image,
        labels,
        [re.sub(r"_n\d{8}$", "", PurePath(path).stem) if path else "" for path in paths],  # NAME_WNID: ImageNet's there
        tuple(names) if names else None,
    )


def _unpack(path: Path, column: str, folder: Path) -> tuple[Path, NDArray[np.int64]]:
    """Write the images of a file one after another, then where they start, and the end: int64 [N + 1].

    What an earlier encode has unpacked is taken.
    """
    status = path.stat()
    key = hashlib.blake2b(f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {column}".encode(), digest_size=16)
    unpacked = folder / key.hexdigest()
    file = _open(path)
    if not unpacked.exists():
        folder.mkdir(exist_ok=True)
        partial = unpacked.with_suffix(".partial")
        ends = [0]
        with partial.open("wb") as output:
            batches = file.iter_batches(_ROWS, columns=[column])
            while batch := _reading(path, lambda: next(batches, None)):
                values = batch.column(0)
                for value in values.field("bytes") if column.endswith(".bytes") and values.type.num_fields else values:
                    content = value.as_py() or b""
                    output.write(content)
                    ends.append(ends[-1] + len(content))
            if not ends[-1]:
                raise DataError(f"{path}: its {column} are all empty: it holds paths of images, not the images")
            output.write(np.array(ends, np.int64).tobytes())
            output.flush()
            os.fsync(output.fileno())  # before it has its name, so that a power cut leaves none that is cut off
        partial.replace(unpacked)
    num = file.metadata.num_rows + 1
    return unpacked, np.fromfile(unpacked, np.int64, num, offset=unpacked.stat().st_size - 8 * num)
