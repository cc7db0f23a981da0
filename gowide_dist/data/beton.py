"""FFCV's file format, version 2: written in a deterministic layout, read without copying.

A file is a header, a description of the fields (`image`, `label`), a table with a row per sample, pages of image bytes
(no image crosses a page) and an allocation table. Offsets count from the start of the file.
"""

import hashlib
import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.info import Split, check_split
from gowide_dist.errors import DataError
from gowide_dist.files import sha256

JPEG, RAW = 0, 1
PAGE_BYTES = 1 << 23

_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table", "<u8")],
    align=True,
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
_STORED = np.dtype([("mode", "<u1"), ("height", "<u2"), ("width", "<u2"), ("offset", "<u8"), ("size", "<u8")])
_ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("size", "<u8")])
_VERSION = 2
# By FFCV's numbers of RGBImageField and IntField.
_FIELDS: dict[int, tuple[str, np.dtype[np.void] | str]] = {2: ("image", _IMAGE), 1: ("label", "<i8")}
_SAMPLE = np.dtype(list(_FIELDS.values()), align=True)
_TABLE_OFFSET = _HEADER.itemsize + len(_FIELDS) * _FIELD.itemsize

_READ_AHEAD_BYTES = 1 << 17  # Linux's usual read-ahead window, to which it cuts each request
MAX_SIDE_PX = int(np.iinfo(np.uint16).max)


class EncodedImage(NamedTuple):
    """An image as a file holds it: raw RGB rows, or a JPEG stream. mode: JPEG or RAW; sides in pixels."""

    mode: int
    height: int
    width: int
    data: bytes


def _next_page(offset: int) -> int:
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


class BetonWriter:
    """Writes samples in the order given; the same samples give the same bytes.

    file: open for writing, and new, or with the images that `add` names. capacity: the largest number of samples. No
    image may be larger than a page.
    """

    def __init__(self, file: BinaryIO, capacity: int):
        self._file, self.num_samples = file, 0
        self._samples, self._allocations = np.zeros(capacity, _SAMPLE), np.zeros(capacity, _ALLOCATION)
        self.end = _next_page(_TABLE_OFFSET + self._samples.nbytes)

    def offset_of_next(self, size: int) -> int:
        """Where an image of `size` bytes belongs if it comes next."""
        return self.end if self.end % PAGE_BYTES + size <= PAGE_BYTES else _next_page(self.end)

    def write(self, image: EncodedImage, label: int) -> int:
        """Write the next image; its offset."""
        offset = self.offset_of_next(len(image.data))
        self._file.seek(offset)
        self._file.write(image.data)
        self.add(image.mode, image.height, image.width, len(image.data), label)
        return offset

    def add(self, mode: int, height: int, width: int, size: int, label: int) -> None:
        """Count the next image, whose bytes are in the file already, where they belong."""
        offset = self.offset_of_next(size)
        self._samples[self.num_samples] = ((mode, width, height, offset), label)
        self._allocations[self.num_samples] = (self.num_samples, offset, size)
        self.end = offset + size
        self.num_samples += 1

    def finish(self) -> Split:
        """Write the tables, and all of the file to the disk."""
        header = np.array([(_VERSION, len(_FIELDS), PAGE_BYTES, self.num_samples, self.end)], _HEADER)
        fields = np.zeros(len(_FIELDS), _FIELD)
        for field, (type_id, (name, _)) in zip(fields, _FIELDS.items(), strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        head = header.tobytes() + fields.tobytes() + self._samples[: self.num_samples].tobytes()
        tail = self._allocations[: self.num_samples].tobytes()
        self._file.seek(self.end)
        self._file.write(tail)
        self._file.truncate()
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fsync(self._file.fileno())  # after a power cut dataset.json must not name a file without its images
        path = Path(self._file.name)
        return Split(
            file=path.name,
            samples=self.num_samples,
            bytes=path.stat().st_size,
            checksum=sha256(path),
            index_checksum=hashlib.sha256(head + tail).hexdigest(),
        )


class StoredImage(NamedTuple):
    """An image's position in an FFCV file of any origin. Sides in pixels, offset and size in bytes."""

    path: Path
    mtime_ns: int
    mode: int
    height: int
    width: int
    offset: int
    size: int

    def read(self) -> EncodedImage:
        """Raises OSError if the file cannot be read."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return EncodedImage(self.mode, self.height, self.width, file.read(self.size))


@dataclass(frozen=True)
class StoredImages:
    """The images of an FFCV file of any origin. rows: of _STORED [N]."""

    path: Path
    mtime_ns: int
    rows: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """A StoredImage by its number, else StoredImages."""
        if isinstance(index, int | np.integer):
            return StoredImage(self.path, self.mtime_ns, *self.rows[index].item())
        return replace(self, rows=self.rows[index])


def read_foreign(path: Path) -> tuple[StoredImages, NDArray[np.int64]]:
    """The images and labels [N] of a file written by FFCV's own DatasetWriter, in the order of its samples.

    Raises DataError unless it is a whole file of the format's version 2 whose samples are an image and an integer.
    """
    broken = DataError(f"{path}: damaged, or no FFCV file of version {_VERSION}; write it again with FFCV")
    try:
        content = np.memmap(path, np.uint8, "r")
        version, num_fields, _, num_samples, tail = np.frombuffer(content, _HEADER, 1)[0].item()
        if version != _VERSION or not num_samples:
            raise broken
        types = np.frombuffer(content, _FIELD, num_fields, _HEADER.itemsize)["type_id"].tolist()
        if sorted(types) != sorted(_FIELDS):
            raise DataError(f"{path}: its samples have other fields than one RGBImageField and one IntField")
        row = np.dtype([_FIELDS[type_id] for type_id in types], align=True)
        samples = np.frombuffer(content, row, num_samples, _TABLE_OFFSET)
        allocations = np.frombuffer(content, _ALLOCATION, offset=tail)
        # Stock FFCV's writers append to the table in any order: an image's allocation is the one with its offset.
        by_offset = np.argsort(allocations["offset"])
        allocation = by_offset[np.searchsorted(allocations["offset"][by_offset], samples["image"]["offset"])]
        if (allocations["offset"][allocation] != samples["image"]["offset"]).any():
            raise broken
        rows = np.empty(num_samples, _STORED)
        for name in ("mode", "height", "width", "offset"):
            rows[name] = samples["image"][name]
        rows["size"] = allocations["size"][allocation]
    except (ValueError, OverflowError, IndexError):  # too short for a table, or no allocation
        raise broken from None
    if ((rows["size"] > len(content)) | (rows["offset"] > len(content) - rows["size"])).any():
        raise broken
    return StoredImages(path, path.stat().st_mtime_ns, rows), samples["label"].astype(np.int64)


class Beton:
    """A file that `gowide encode` wrote, mapped into memory.

    bytes: uint8 [file size]. Per sample [N]: labels int64, modes uint8 (JPEG or RAW), heights and widths in pixels,
    offsets and sizes of the image's bytes, pages: the number of the image's page. Raises DataError if the file differs
    from dataset.json.
    """

    def __init__(self, path: Path):
        self.path, split = path, check_split(path)
        try:
            with path.open("rb") as file:
                head = file.read(_TABLE_OFFSET + split.samples * _SAMPLE.itemsize)
                file.seek(-split.samples * _ALLOCATION.itemsize, os.SEEK_END)
                tail = file.read()
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        if hashlib.sha256(head + tail).hexdigest() != split.index_checksum:
            raise DataError(f"{path}: damaged: its index has changed since it was written; delete it and encode again")
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        samples = np.frombuffer(head, _SAMPLE, offset=_TABLE_OFFSET)
        images = samples["image"]
        self.labels = samples["label"].copy()
        self.modes = images["mode"].copy()
        self.heights, self.widths = images["height"].astype(np.int64), images["width"].astype(np.int64)
        self.offsets = images["offset"].astype(np.int64)
        self.sizes = np.frombuffer(tail, _ALLOCATION)["size"].astype(np.int64)
        self.pages = self.offsets // PAGE_BYTES

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> EncodedImage:
        """An image as it is stored."""
        data = self.bytes[self.offsets[index] :][: self.sizes[index]].tobytes()
        return EncodedImage(int(self.modes[index]), int(self.heights[index]), int(self.widths[index]), data)

    def read_ahead(self, page: int) -> None:
        """Ask the system to read a page of the file into its cache. Returns at once."""
        end = min((page + 1) * PAGE_BYTES, len(self._map))
        for start in range(page * PAGE_BYTES, end, _READ_AHEAD_BYTES):
            self._map.madvise(mmap.MADV_WILLNEED, start, min(_READ_AHEAD_BYTES, end - start))
