"""A split's FFCV file while it is written: what an encode that stops has done, the next one takes over.

NAME.beton grows image by image, and NAME.journal by a record of each, written after the image has reached the disk. An
image is known by a key, a hash of all that determines its bytes, and taken over only if it still has its checksum: a
disk that was full or lost its power may hold anything. Those that come in the same order again stay in their place;
where the order has changed, the rest of the file moves to NAME.aside and is copied back image by image. So the file has
the same bytes as if it had been written at once.
"""

import errno
import os
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.beton import BetonWriter, EncodedImage
from gowide_dist.data.images import Sample
from gowide_dist.data.info import Split
from gowide_dist.progress import say, track

_RECORD = np.dtype([
    ("crc", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("key", "S32"), ("mode", "u1"), ("height", "<u2"),
    ("width", "<u2"), ("peak", "<u2"), ("composed", "?"), ("moments", "<f8", (2, 3)),
])  # fmt: skip
_PLACE_BYTES = 16  # crc, offset and size, which come first
_SYNC_EVERY_S = 10.0
_COPIED_BYTES = 1 << 24
_ROOM_BYTES = 1 << 16  # for what a file system adds


def _ends(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Where the images end: [N]."""
    return np.asarray(records["offset"] + records["size"])


def _crc(record: NDArray[np.void] | np.void, image: bytes) -> int:
    """Of an image and all that its record says of it, but where it is."""
    return zlib.crc32(image, zlib.crc32(record.tobytes()[_PLACE_BYTES:]))


class _Log:
    """A file of images and its journal. records: of _RECORD, those whose images are whole."""

    def __init__(self, data: Path, journal: Path):
        self.data = data.open("r+b" if data.exists() else "w+b")
        self._journal = journal.open("r+b" if journal.exists() else "w+b", buffering=0)
        content = self._journal.readall()
        records = np.frombuffer(content, _RECORD, len(content) // _RECORD.itemsize)
        size = data.stat().st_size
        whole = (_ends(records) <= size) & (records["offset"] <= size)  # the sum wraps where a record is damaged
        self.records = records[: len(records) if whole.all() else int(whole.argmin())]
        if content and not len(self.records):
            say(f"note: {journal}: damaged, or of another version; what it lists is encoded anew")
        self.truncate(len(self.records), int(_ends(self.records).max(initial=0)))

    def truncate(self, num_records: int, num_bytes: int) -> None:
        self._journal.truncate(num_records * _RECORD.itemsize)
        self.data.truncate(num_bytes)

    def append(self, records: NDArray[np.void]) -> None:
        """Write the images that were written to `data` to the disk, then their records."""
        self.data.flush()
        os.fsync(self.data.fileno())
        start = self._journal.seek(0, os.SEEK_END)
        if self._journal.write(records.tobytes()) < records.nbytes:
            self._journal.truncate(start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._journal.fileno())

    def salvage(self, records: NDArray[np.void]) -> None:
        """What `append` does, on a full disk: the last images make room for the records of the others."""
        size = os.fstat(self.data.fileno()).st_size
        kept = records[_ends(records) + np.uint64(records.nbytes + _ROOM_BYTES) <= size]
        if len(kept):
            os.ftruncate(self.data.fileno(), int(_ends(kept).max()))
            self._journal.seek(0, os.SEEK_END)
            self._journal.write(kept.tobytes())

    def read(self, offset: int, size: int) -> bytes:
        self.data.seek(offset)
        return self.data.read(size)

    def close(self) -> None:
        for file in (self.data, self._journal):
            with suppress(OSError):  # a full disk, which has been told
                file.close()


class SplitFile:
    """NAME.beton in `folder`, to write in order. earlier: whether an encode that stopped has left images there."""

    def __init__(self, folder: Path, name: str, capacity: int):
        self._main = _Log(folder / f"{name}.beton", folder / f"{name}.journal")
        self._aside = _Log(folder / f"{name}.aside", folder / f"{name}.aside.journal")
        self._records = np.concatenate([self._main.records, self._aside.records])
        self._num_main = len(self._main.records)  # the others are aside
        self._num_placed = 0  # records of the main file that are the start of the new one too
        self._writer = BetonWriter(self._main.data, capacity)
        self._pending: list[NDArray[np.void]] = []
        self._synced = time.monotonic()
        self._needed = np.zeros(len(self._records), np.bool_)
        self.earlier = len(self._records) > 0
        if self._num_main:
            start = self._main.read(0, min(self._writer.end, int(self._main.records["offset"].min())))
            if start.count(0) < len(start):  # the tables of a finished file; else a hole, which takes no space
                self._main.data.seek(0)
                self._main.data.write(bytes(len(start)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        try:
            self._sync()
        except OSError:  # a full disk, which has been told
            with suppress(OSError):
                self._main.salvage(np.stack(self._pending))
        self._main.close()
        self._aside.close()

    @property
    def num_samples(self) -> int:
        return self._writer.num_samples

    def find(self, keys: Iterable[str]) -> NDArray[np.int64]:
        """The number of the record with each of the keys, or -1 if there is none or its image is damaged: [N]."""
        wanted = np.fromiter((key.encode() for key in keys), _RECORD["key"])
        order = np.argsort(self._records["key"], kind="stable")
        at = np.searchsorted(self._records["key"][order], wanted).clip(max=len(order) - 1)
        found = order[at]
        known = self._records["key"][found] == wanted
        self._needed[found[known]] = True
        candidates = np.flatnonzero(self._needed).tolist()
        damaged = [
            number for number in track(candidates, "checking what there is", len(candidates)) if self._damaged(number)
        ]
        if damaged:
            say(f"note: {len(damaged):,} of these images are damaged on the disk, and are encoded anew")
        self._needed[damaged] = False
        return np.where(known & self._needed[found], found, -1)

    def _read(self, number: int) -> bytes:
        log = self._main if number < self._num_main else self._aside
        return log.read(int(self._records["offset"][number]), int(self._records["size"][number]))

    def _damaged(self, number: int) -> bool:
        return _crc(self._records[number], self._read(number)) != int(self._records["crc"][number])

    def take(self, number: int, label: int) -> Sample:
        """Write the image of a record that `find` gave as the next one."""
        record = self._records[number]
        _, offset, size, key, mode, height, width, peak, composed, moments = record.item()
        moments = np.array(moments)
        in_place = number == self._num_placed < self._num_main and offset == self._writer.offset_of_next(size)
        if in_place:
            self._writer.add(mode, height, width, size, label)
            self._num_placed += 1
            return Sample(EncodedImage(mode, height, width, b""), label, moments, peak, composed)
        self._set_aside()
        image = EncodedImage(mode, height, width, self._read(number))
        sample = Sample(image, label, moments, peak, composed)
        self.write(sample, key.decode())
        return sample

    def write(self, sample: Sample, key: str) -> None:
        """Write a new image as the next one."""
        self._set_aside()
        image = sample.image
        offset = self._writer.write(image, sample.label)
        row = (
            0, offset, len(image.data), key, image.mode, image.height,
            image.width, sample.peak, sample.composed, sample.moments,
        )  # fmt: skip
        record = np.array(row, _RECORD)
        record["crc"] = _crc(record, image.data)
        self._pending.append(record)
        if time.monotonic() - self._synced > _SYNC_EVERY_S:
            self._sync()

    def _set_aside(self) -> None:
        """Move what follows the placed images out of the way of others."""
        if self._num_placed == self._num_main:
            return
        tail = self._records[self._num_placed : self._num_main]
        if self._needed[self._num_placed : self._num_main].any():
            start, end = int(tail["offset"].min()), int(_ends(tail).max())
            to = self._aside.data.seek(0, os.SEEK_END)
            for at in range(start, end, _COPIED_BYTES):
                self._aside.data.write(self._main.read(at, min(_COPIED_BYTES, end - at)))
            tail["offset"] = tail["offset"] - np.uint64(start) + np.uint64(to)
            self._aside.append(tail)
        self._num_main = self._num_placed
        self._main.truncate(self._num_placed, self._writer.end if self._num_placed else 0)

    def _sync(self) -> None:
        if self._pending:
            self._main.append(np.stack(self._pending))
            self._pending = []
        self._synced = time.monotonic()

    def finish(self) -> Split:
        """Write the tables, and all of the file to the disk."""
        self._sync()
        return self._writer.finish()
