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
_SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
_ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("size", "<u8")])
_VERSION = 2
_FIELDS = (("image", 2), ("label", 1))  # FFCV's numbers of RGBImageField and IntField
_TABLE_OFFSET = _HEADER.itemsize + len(_FIELDS) * _FIELD.itemsize

MAX_SIDE_PX = int(np.iinfo(np.uint16).max)


class EncodedImage(NamedTuple):
    """An image as it lies in the file: raw RGB rows, or a JPEG stream. Sides in pixels."""

    mode: int
    height: int
    width: int
    data: bytes


def _next_page(offset: int) -> int:
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


class BetonWriter:
    """Writes samples in the order given; the same samples give the same bytes. A context manager.

    capacity: the most samples that may come. Raises DataError for an image larger than a page.
    """

    def __init__(self, path: Path, capacity: int):
        self._path = path
        self._samples = np.zeros(capacity, _SAMPLE)
        self._sizes = np.zeros(capacity, np.uint64)
        self._file: BinaryIO = path.open("wb")
        self.num_samples = 0
        self._end = _next_page(_TABLE_OFFSET + self._samples.nbytes)

    def write(self, image: EncodedImage, label: int) -> None:
        """Append a sample."""
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._write_tables()

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
        for field, (name, type_id) in zip(fields, _FIELDS, strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes() + samples.tobytes())


def read_index(path: Path, num_samples: int) -> tuple[bytes, bytes]:
    """All but the images of a file: the header with the table of samples, and the allocation table."""
    with path.open("rb") as file:
        head = file.read(_TABLE_OFFSET + num_samples * _SAMPLE.itemsize)
        file.seek(-num_samples * _ALLOCATION.itemsize, os.SEEK_END)
        return head, file.read()


def index_checksum(index: tuple[bytes, bytes]) -> str:
    """SHA-256 of what read_index returns."""
    return hashlib.sha256(b"".join(index)).hexdigest()


class Beton:
    """A file that `gowide encode` wrote, mapped into memory.

    bytes: uint8 [file size]. Per sample [N]: labels int64, modes uint8 (JPEG or RAW), heights and widths (pixels),
    offsets and sizes of the image's bytes, pages (which one the image lies in). Raises DataError if the file is not
    what dataset.json says.
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
            raise DataError(f"{path}: damaged: its index is not the one that was written; delete it and encode again")
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
        start = page * self.page_bytes
        self._map.madvise(mmap.MADV_WILLNEED, start, min(self.page_bytes, len(self._map) - start))
