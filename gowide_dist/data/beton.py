"""FFCV's file format, version 2: written in a deterministic layout, read without copying.

A file is a header, a description of the fields (`image`, `label`), a table with a row per sample, pages of image bytes
(no image crosses a page) and an allocation table. Offsets count from the start of the file.
"""

import hashlib
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.info import check_split
from gowide_dist.errors import DataError

JPEG, RAW = 0, 1
PAGE_BYTES = 1 << 23

_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table", "<u8")],
    align=True,
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
_ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("size", "<u8")])
_VERSION = 2
_FIELDS: dict[int, tuple[str, np.dtype[np.void] | str]] = {  # by FFCV's numbers of RGBImageField and IntField
    2: ("image", _IMAGE),
    1: ("label", "<i8"),
}
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
    """Writes samples in the order given; the same samples give the same bytes. A context manager.

    capacity: the largest number of samples. Raises DataError for an image larger than a page.
    """

    def __init__(self, path: Path, capacity: int):
        self._path = path
        self._samples = np.zeros(capacity, _SAMPLE)
        self._sizes = np.zeros(capacity, np.uint64)
        self._file: BinaryIO = path.open("wb")
        self.num_samples = 0
        self._end = _next_page(_TABLE_OFFSET + self._samples.nbytes)

    def write(self, image: EncodedImage, label: int) -> None:
        size = len(image.data)
        if size > PAGE_BYTES:
            raise DataError(
                f"{self._path.name}: an image of {image.width}x{image.height} px takes {size:,} bytes, more than a "
                f"page of {PAGE_BYTES:,}; encode with --write-mode jpg or a smaller --max-side-px"
            )
        if self._end % PAGE_BYTES + size > PAGE_BYTES:
            self._end = _next_page(self._end)
        self._file.seek(self._end)
        self._file.write(image.data)
        self._samples[self.num_samples] = ((image.mode, image.width, image.height, self._end), label)
        self._sizes[self.num_samples] = size
        self._end += size
        self.num_samples += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if error_type is None:
                self._write_tables()
                self._file.flush()
                os.fsync(self._file.fileno())  # after a power cut the index must not point at unwritten images

    def _write_tables(self) -> None:
        samples = self._samples[: self.num_samples]
        allocations = np.zeros(self.num_samples, _ALLOCATION)
        allocations["sample"] = np.arange(self.num_samples)
        allocations["offset"] = samples["image"]["offset"]
        allocations["size"] = self._sizes[: self.num_samples]
        self._file.seek(self._end)
        self._file.write(allocations.tobytes())

        header = np.array([(_VERSION, len(_FIELDS), PAGE_BYTES, self.num_samples, self._end)], _HEADER)
        fields = np.zeros(len(_FIELDS), _FIELD)
        for field, (type_id, (name, _)) in zip(fields, _FIELDS.items(), strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + samples.tobytes())


class StoredImage(NamedTuple):
    """An image's position in an FFCV file of any origin. Sides in pixels, offset and size in bytes."""

    path: Path
    mode: int
    height: int
    width: int
    offset: int
    size: int

    def read(self) -> EncodedImage:
        """Raises OSError if the file cannot be read, ValueError if it is too short."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise ValueError(f"{len(data):,} bytes instead of {self.size:,}")
        return EncodedImage(self.mode, self.height, self.width, data)


def read_foreign(path: Path) -> tuple[list[StoredImage], NDArray[np.int64]]:
    """The images and labels [N] of a file written by FFCV's own DatasetWriter, in the order of its samples.

    Raises DataError unless it is a whole file of the format's version 2 whose samples are an image and an integer.
    """
    content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    broken = DataError(f"{path}: damaged, or no FFCV file of version {_VERSION}; write it again with FFCV")
    if len(content) < _HEADER.itemsize:
        raise broken
    header = content[: _HEADER.itemsize].view(_HEADER)[0]
    num_fields, num_samples, tail = int(header["num_fields"]), int(header["num_samples"]), int(header["alloc_table"])
    start = _HEADER.itemsize + num_fields * _FIELD.itemsize
    if header["version"] != _VERSION or not num_samples or not start < tail < len(content):
        raise broken
    types = content[_HEADER.itemsize : start].view(_FIELD)["type_id"].tolist()
    if sorted(types) != sorted(_FIELDS):
        raise DataError(f"{path}: its samples have other fields than one RGBImageField and one IntField")
    row = np.dtype([_FIELDS[type_id] for type_id in types], align=True)
    if start + num_samples * row.itemsize > tail or (len(content) - tail) % _ALLOCATION.itemsize:
        raise broken
    samples = content[start : start + num_samples * row.itemsize].view(row)
    allocations = content[tail:].view(_ALLOCATION)
    allocations = allocations[np.argsort(allocations["offset"])]
    images = samples["image"]
    # Stock FFCV's writers append to the table in any order: an image's allocation is the one with its offset.
    allocations = allocations[np.searchsorted(allocations["offset"], images["offset"]).clip(max=len(allocations) - 1)]
    ends = allocations["offset"] + allocations["size"]
    if (allocations["offset"] != images["offset"]).any() or ends.max() > len(content):
        raise broken
    columns = (images["mode"], images["height"], images["width"], images["offset"], allocations["size"])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [StoredImage(path, *row) for row in rows], samples["label"].astype(np.int64)


def read_index(path: Path, num_samples: int) -> tuple[bytes, bytes]:
    """The bytes of a file without its images: the header with the table of samples, and the allocation table."""
    with path.open("rb") as file:
        head = file.read(_TABLE_OFFSET + num_samples * _SAMPLE.itemsize)
        file.seek(-num_samples * _ALLOCATION.itemsize, os.SEEK_END)
        return head, file.read()


def index_checksum(index: tuple[bytes, bytes]) -> str:
    """SHA-256 of what read_index returns."""
    return hashlib.sha256(b"".join(index)).hexdigest()


class Beton:
    """A file that `gowide encode` wrote, mapped into memory.

    bytes: uint8 [file size]. Per sample [N]: labels int64, modes uint8 (JPEG or RAW), heights and widths in pixels,
    offsets and sizes of the image's bytes, pages: the number of the image's page. Raises DataError if the file differs
    from dataset.json.
    """

    def __init__(self, path: Path):
        split = check_split(path)
        try:
            index = read_index(path, split.samples)
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        if index_checksum(index) != split.index_checksum:
            raise DataError(f"{path}: damaged: its index has changed since it was written; delete it and encode again")
        head, tail = index
        self.path = path
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.page_bytes = int(np.frombuffer(head, _HEADER, 1)["page_size"][0])
        samples = np.frombuffer(head, _SAMPLE, offset=_TABLE_OFFSET)
        images = samples["image"]
        self.labels = samples["label"].copy()
        self.modes = images["mode"].copy()
        self.heights = images["height"].astype(np.int64)
        self.widths = images["width"].astype(np.int64)
        self.offsets = images["offset"].astype(np.int64)
        self.sizes = np.frombuffer(tail, _ALLOCATION)["size"].astype(np.int64)
        self.pages = self.offsets // self.page_bytes

    def __len__(self) -> int:
        return len(self.labels)

    def read_ahead(self, page: int) -> None:
        """Ask the system to read a page of the file into its cache. Returns at once."""
        end = min((page + 1) * self.page_bytes, len(self._map))
        for start in range(page * self.page_bytes, end, _READ_AHEAD_BYTES):
            self._map.madvise(mmap.MADV_WILLNEED, start, min(_READ_AHEAD_BYTES, end - start))
