"""`gowide data verify`: compares the files of a dataset with dataset.json, and decodes every image."""

from collections.abc import Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from gowide_dist.data.beton import Beton
from gowide_dist.data.images import decode_stored
from gowide_dist.data.info import FILE_NAME, DatasetInfo, Split, read_dataset_info
from gowide_dist.errors import DataError
from gowide_dist.files import sha256
from gowide_dist.machine import num_cores
from gowide_dist.progress import say, track

_CHUNK = 64  # images that a thread is given at a time


def verify_dataset(folder: Path, workers: int | None = None) -> DatasetInfo:
    """Check the files of a dataset against dataset.json: checksums, counts, labels, and every image decoded.

    workers: threads, by default one a core. Prints every fault to stderr. Raises DataError if there is one.
    """
    info = read_dataset_info(folder / FILE_NAME)
    faults = []
    for split in info.splits.values():
        for fault in _faults(folder / split.file, split, len(info.classes), workers):
            say(f"fault in {split.file}: {fault}")
            faults.append(f"{split.file}: {fault}")
    if faults:
        raise DataError(f"{folder}: {len(faults):,} faults (listed above; first: {faults[0]}); encode it again")
    return info


def _faults(path: Path, split: Split, num_classes: int, workers: int | None) -> Iterator[str]:
    try:
        beton = Beton(path)
    except DataError as error:
        yield str(error)
        return
    if sha256(path) != split.checksum:
        yield "its checksum is not the one in dataset.json"
    low, high = beton.labels.min(), beton.labels.max()
    if low < 0 or high >= num_classes:
        yield f"labels {low} to {high}, but {num_classes} classes"
    with ThreadPool(workers or num_cores()) as pool:
        faults = pool.imap(partial(_image_fault, beton), range(len(beton)), _CHUNK)
        yield from filter(None, track(faults, f"verifying {split.file}", len(beton)))


def _image_fault(beton: Beton, index: int) -> str | None:
    try:
        decode_stored(beton.image(index))
    except (OSError, SyntaxError, ValueError) as error:
        return f"image {index}: {error}"
    return None
