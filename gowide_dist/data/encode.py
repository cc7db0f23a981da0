"""`gowide encode`: a dataset in its usual form on disk becomes train.beton, val.beton and dataset.json."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.beton import Beton, BetonWriter, EncodedImage, index_checksum, read_index
from gowide_dist.data.idx import read_idx
from gowide_dist.data.images import channel_moments, encode_raw
from gowide_dist.data.info import FILE_NAME, DatasetInfo, Split, read_dataset_info
from gowide_dist.data.progress import say, track
from gowide_dist.errors import DataError

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

SplitName = Literal["train", "val", "test"]
Encoding = dict[str, str | int | float | bool | None]


class Sample(NamedTuple):
    """An image ready to be written. moments: see channel_moments."""

    image: EncodedImage
    label: int
    moments: NDArray[np.float64]


class Samples(NamedTuple):
    """The samples of a split, in the order of the file; `total` at most."""

    total: int
    stream: Iterator[Sample]


Splits = Mapping[SplitName, Samples]


def encode_fashion_mnist(out: Path, root: Path | None = None) -> DatasetInfo:
    """Encode Fashion-MNIST, or any images in its four idx files, as raw RGB.

    root: folder of the idx files; by default where Debian's package puts them. Does nothing if `out` already holds
    this. Raises DataError for files that are missing or damaged, and if `out` holds something else.
    """
    root = root or FASHION_MNIST_ROOT
    encoding: Encoding = {"dataset": "fashion-mnist", "root": str(root.resolve())}
    if info := find_encoded(out, encoding):
        return info
    if not root.is_dir():
        raise DataError(f"{root}: not found; run `apt install dataset-fashion-mnist` or give --root")
    splits: Splits = {"train": _read_idx_split(root, "train"), "val": _read_idx_split(root, "t10k")}
    return write_dataset(out, f"Fashion-MNIST from {root}", encoding, FASHION_MNIST_CLASSES, splits)


def _read_idx_split(root: Path, prefix: str) -> Samples:
    images = read_idx(root / f"{prefix}-images-idx3-ubyte", 3)
    labels = read_idx(root / f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(images):
        raise DataError(f"{root}: {len(images):,} images but {len(labels):,} labels in the files {prefix}-*")
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(f"{root}/{prefix}-labels-idx1-ubyte: label {labels.max()}; the classes are 0 to 9")
    rgb = (np.repeat(image[:, :, None], 3, axis=2) for image in images)
    stream = (Sample(encode_raw(i), int(label), channel_moments(i)) for i, label in zip(rgb, labels, strict=True))
    return Samples(len(images), stream)


def find_encoded(out: Path, encoding: Encoding) -> DatasetInfo | None:
    """What is in `out`, if it is whole and was made by the same `encoding`; None if it must be made.

    Raises DataError if `out` holds a dataset that was made in another way.
    """
    if not (out / FILE_NAME).exists():
        return None
    info = read_dataset_info(out / FILE_NAME)
    if info.encoding != encoding:
        raise DataError(f"{out}: holds another dataset ({info.encoding}); remove it or choose another --out")
    try:
        for split in info.splits.values():
            Beton(out / split.file)
    except DataError as error:
        say(f"{error}: encoding again")
        return None
    counts = ", ".join(f"{split.samples:,} {name}" for name, split in info.splits.items())
    say(f"{out}: already encoded ({counts}); nothing to do")
    return info


def write_dataset(out: Path, source: str, encoding: Encoding, classes: tuple[str, ...], splits: Splits) -> DatasetInfo:
    """Write the files of a dataset beside `out`, then move them in, dataset.json last: without it there is no dataset.

    Raises DataError if the folder cannot be written or the disk is full; nothing is then left.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            info = _write_files(partial, source, encoding, classes, splits)
            out.mkdir(exist_ok=True)
            (out / FILE_NAME).unlink(missing_ok=True)
            for path in sorted(partial.iterdir(), key=lambda path: path.name == FILE_NAME):
                path.replace(out / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from error
    return info


def _write_files(
    folder: Path, source: str, encoding: Encoding, classes: tuple[str, ...], splits: Splits
) -> DatasetInfo:
    sides: set[tuple[int, int]] = set()
    moments = np.zeros((2, 3))
    files: dict[SplitName, Split] = {}
    for name, samples in splits.items():
        path = folder / f"{name}.beton"
        with BetonWriter(path, samples.total) as writer:
            for image, label, image_moments in track(samples.stream, f"encoding {name}", samples.total):
                writer.write(image, label)
                sides.add((image.height, image.width))
                if name == "train":
                    moments += image_moments
        if name == "train":
            moments /= writer.num_samples
        files[name] = _describe(path, writer.num_samples)
    heights_and_widths = {side for pair in sides for side in pair}
    smallest, largest = min(heights_and_widths), max(heights_and_widths)
    info = DatasetInfo(
        source=source,
        encoding=encoding,
        classes=classes,
        min_side_px=smallest,
        max_side_px=largest,
        fixed_side_px=largest if smallest == largest else None,
        mean=tuple(moments[0].round(6)),
        std=tuple(np.sqrt(moments[1] - moments[0] ** 2).round(6)),
        splits=files,
    )
    (folder / FILE_NAME).write_text(info.model_dump_json(indent=2) + "\n")
    return info


def _describe(path: Path, num_samples: int) -> Split:
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return Split(
        file=path.name,
        samples=num_samples,
        bytes=path.stat().st_size,
        checksum=checksum,
        index_checksum=index_checksum(read_index(path, num_samples)),
    )
