"""`gowide data verify`: is a dataset on disk still what was encoded?"""

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from gowide_dist.data.beton import JPEG, Beton
from gowide_dist.data.info import FILE_NAME, DatasetInfo, Split, read_dataset_info
from gowide_dist.errors import DataError
from gowide_dist.progress import say, track

_CHUNK = 1024


def verify_dataset(folder: Path, workers: int | None = None) -> DatasetInfo:
    """Check the files of a dataset against dataset.json: checksums, counts, labels, and every image decoded.

    workers: threads, by default one a core. Names every fault on stderr. Raises DataError if there is one.
    """
    info = read_dataset_info(folder / FILE_NAME)
    faults = [fault for split in info.splits.values() for fault in _faults(folder, split, info, workers)]
    if faults:
        raise DataError(f"{folder}: encode it again: {len(faults):,} faults, listed above, the first: {faults[0]}")
    return info


def _faults(folder: Path, split: Split, info: DatasetInfo, workers: int | None) -> Iterator[str]:
    for fault in _find_faults(folder / split.file, split, info, workers):
        say(f"fault in {split.file}: {fault}")
        yield f"{split.file}: {fault}"


def _find_faults(path: Path, split: Split, info: DatasetInfo, workers: int | None) -> Iterator[str]:
    try:
        beton = Beton(path)
    except DataError as error:
        yield str(error)
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != split.checksum:
            yield "its checksum is not the one that was written"
    if beton.labels.min() < 0 or beton.labels.max() >= len(info.classes):
        yield f"labels {beton.labels.min()} to {beton.labels.max()}, but {len(info.classes)} classes"

    def fault_of(index: int) -> str | None:
        height, width = int(beton.heights[index]), int(beton.widths[index])
        stored = beton.bytes[beton.offsets[index] :][: beton.sizes[index]]
        if beton.modes[index] != JPEG:
            return None if stored.size == height * width * 3 else f"image {index}: {stored.size} bytes"
        try:
            with Image.open(io.BytesIO(stored.tobytes())) as image:
                image.load()
        except (OSError, SyntaxError) as error:
            return f"image {index}: {error}"
        return None if image.size == (width, height) else f"image {index}: {image.size} px"

    def fault_of_each() -> Iterator[str | None]:
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            for start in range(0, len(beton), _CHUNK):
                yield from pool.map(fault_of, range(start, min(start + _CHUNK, len(beton))))

    yield from filter(None, track(fault_of_each(), f"verifying {split.file}", len(beton)))
