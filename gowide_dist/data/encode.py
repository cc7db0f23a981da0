"""`gowide encode`: a dataset in its usual form on disk becomes train.beton, val.beton and dataset.json."""

import hashlib
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gowide_dist import stop
from gowide_dist.data.beton import Beton, BetonWriter, index_checksum, read_index
from gowide_dist.data.images import BadImage, Sample, Storage, encode_sample
from gowide_dist.data.info import FILE_NAME, DatasetInfo, Split, read_dataset_info
from gowide_dist.data.sources import (
    Dataset,
    Images,
    SplitName,
    check_utf8,
    read_cifar,
    read_fashion_mnist,
    read_ffcv,
    read_image_folder,
    stratified,
)
from gowide_dist.errors import DataError
from gowide_dist.files import try_lock
from gowide_dist.progress import say, track

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
SKIPPED_FILE_NAME, LOCK_FILE_NAME, PARTIAL_NAME = "skipped.txt", ".lock", ".partial"
MIN_STD = 1 / 255  # of a channel that is the same everywhere, by which images are divided

_CHUNK = 8  # files that a worker is sent at a time; raw ones take up to 8 MB each
_CHUNKS_AHEAD = 4  # for each worker

Encoding: TypeAlias = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Options:
    """How to encode.

    jpg_share: part of the images stored as JPEG, of `quality` 1 to 100; the others are stored raw; None, for FFCV files
    alone, leaves every image as it is. max_side_px: larger images are shrunk to it. subset: this many training images
    only; held_out: this many training images become the validation part, and what was the validation part becomes
    `test`; both stratified. skip_bad: leave files out that hold no whole image, and list them in skipped.txt. workers:
    processes that read files, by default one a core.
    """

    jpg_share: float | None = 0.0
    quality: int = 90
    max_side_px: int | None = None
    subset: int | None = None
    held_out: int | None = None
    skip_bad: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        for option, value, low, high in (("write-mode", self.jpg_share, 0, 1), ("quality", self.quality, 1, 100)):
            if value is not None and not low <= value <= high:
                raise DataError(f"--{option} {value:g}: give a number from {low} to {high}")
        for name in ("max_side_px", "subset", "held_out"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"--{_dashed(name)} {value}: give a number above 0")
        for name in ("max_side_px", "quality"):
            if self.jpg_share is None and getattr(self, name) != getattr(Options, name):
                raise DataError(
                    f"--{_dashed(name)}: stored images stay as they are unless --write-mode says how to store them"
                )

    @property
    def storage(self) -> Storage:
        """What concerns the single image."""
        return Storage(self.jpg_share, self.quality, self.max_side_px)

    def differing(self) -> Encoding:
        """What is not the default and changes the result."""
        default = asdict(Options())
        return {name: value for name, value in asdict(self).items() if value != default[name] and name != "workers"}


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def encode_fashion_mnist(out: Path, root: Path | None = None, options: Options | None = None) -> DatasetInfo:
    """Encode Fashion-MNIST, or any images in its four idx files. As all encode functions:

    Does nothing if `out` already holds this. root: where the dataset lies; here by default where Debian's package puts
    it. Raises DataError for files that are missing or damaged, if `out` holds something else, and if the disk is full;
    nothing is then left under the final names.
    """
    root = root or FASHION_MNIST_ROOT
    if not root.is_dir():
        raise DataError(f"{root}: not found; run `apt install dataset-fashion-mnist` or give --root")
    return _encode("fashion-mnist", out, root, options or Options())


def encode_cifar10(out: Path, root: Path, options: Options | None = None) -> DatasetInfo:
    """Encode CIFAR-10 from cifar-10-batches-py."""
    return _encode("cifar10", out, root, options or Options())


def encode_cifar100(out: Path, root: Path, options: Options | None = None) -> DatasetInfo:
    """Encode CIFAR-100, its fine labels, from cifar-100-python."""
    return _encode("cifar100", out, root, options or Options())


def encode_image_folder(out: Path, root: Path, options: Options | None = None) -> DatasetInfo:
    """Encode train/CLASS/* and val/CLASS/*, by default all as JPEG."""
    return _encode("imagefolder", out, root, options or Options(jpg_share=1.0))


def encode_ffcv(out: Path, root: Path, options: Options | None = None) -> DatasetInfo:
    """Take over the files that FFCV's DatasetWriter has written, by default every image as it is."""
    return _encode("ffcv", out, root, options or Options(jpg_share=None))


_READERS: dict[str, Callable[[Path], Dataset]] = {
    "fashion-mnist": read_fashion_mnist,
    "cifar10": partial(read_cifar, num_classes=10),
    "cifar100": partial(read_cifar, num_classes=100),
    "imagefolder": read_image_folder,
    "ffcv": read_ffcv,
}


def encode(name: str, out: Path, root: Path | None, options: Options) -> DatasetInfo:
    """Encode the dataset called `name` on the command line. Raises DataError if it needs a `root` that is not given."""
    if name == "fashion-mnist":
        return encode_fashion_mnist(out, root, options)
    if root is None:
        raise DataError(f"encode {name}: give the folder of the dataset as --root")
    return _encode(name, out, root, options)


def _encode(name: str, out: Path, root: Path, options: Options) -> DatasetInfo:
    if options.jpg_share is None and name != "ffcv":
        raise DataError(f"encode {name}: only FFCV files hold images that can stay as they are; give a write mode")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is no folder; choose another --out")
    if out.resolve() == root.resolve():
        raise DataError(f"{out}: is where the images are; choose another --out")
    check_utf8(root.resolve())
    encoding: Encoding = {"dataset": name, "root": str(root.resolve()), **options.differing()}
    if info := find_encoded(out, encoding):
        return info
    try:
        dataset = _READERS[name](root)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return write_dataset(out, _divide(dataset, options), encoding, options)


def find_encoded(out: Path, encoding: Encoding) -> DatasetInfo | None:
    """What is in `out`, if it is whole and was made by the same `encoding`; None if it must be made.

    Raises DataError if `out` holds a dataset that was made in another way.
    """
    if not (out / FILE_NAME).exists():
        return None
    try:
        info = read_dataset_info(out / FILE_NAME)
    except DataError as error:
        say(f"{error}; encoding now")
        return None
    if info.encoding != encoding:
        raise DataError(f"{out}: holds another dataset ({info.encoding}); remove it or choose another --out")
    try:
        for split in info.splits.values():
            Beton(out / split.file)
    except DataError as error:
        say(f"{error}; encoding now")
        return None
    counts = ", ".join(f"{split.samples:,} {name}" for name, split in info.splits.items())
    say(f"{out}: already encoded ({counts}); nothing to do")
    return info


def _divide(dataset: Dataset, options: Options) -> Dataset:
    """Cut the validation part from training, then the subset, as the options say."""
    splits = dict(dataset.splits)
    for name, count in (("held-out", options.held_out), ("subset", options.subset)):
        train = splits["train"]
        if count is None:
            continue
        if count >= len(train) + (name == "subset"):
            raise DataError(f"--{name} {count:,}: there are {len(train):,} training images")
        chosen = stratified(train.labels, count)
        if name == "held-out":
            if "val" in splits:
                splits["test"] = splits["val"]
            splits["val"] = train.take(np.flatnonzero(chosen))
            chosen = ~chosen
        splits["train"] = train.take(np.flatnonzero(chosen))
    if "val" not in splits:
        raise DataError(f"{dataset.description}: no validation images; give --held-out to take some from training")
    return Dataset(dataset.description, dataset.classes, splits)


def write_dataset(out: Path, dataset: Dataset, encoding: Encoding, options: Options) -> DatasetInfo:
    """Write the files of a dataset into a folder in `out`, then move them up, dataset.json last: it makes the dataset.

    Raises DataError if an image is bad, the folder cannot be written, another process is encoding into it, or it holds
    somebody's files; nothing is then left.
    """
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with try_lock(out / LOCK_FILE_NAME) as mine:
            if not mine:
                raise DataError(f"{out}: another process is encoding into it; wait for it, or choose another --out")
            try:
                return _write_in(out, dataset, encoding, options)
            except BaseException:
                if is_new:
                    shutil.rmtree(out, ignore_errors=True)
                raise
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from error


def _write_in(out: Path, dataset: Dataset, encoding: Encoding, options: Options) -> DatasetInfo:
    partial = out / PARTIAL_NAME
    theirs = sorted(path.name for path in out.glob("*.beton"))
    if theirs and not (out / FILE_NAME).exists() and not partial.exists():
        raise DataError(f"{out}: holds {theirs[0]}, which was not encoded there; move it, or choose another --out")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        info = _write_files(partial, dataset, encoding, options)
        (out / FILE_NAME).unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == FILE_NAME):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


def _write_files(folder: Path, dataset: Dataset, encoding: Encoding, options: Options) -> DatasetInfo:
    sides: set[int] = set()
    moments = np.zeros((2, 3))
    bad: list[BadImage] = []
    files: dict[SplitName, Split] = {}
    for name, images in dataset.splits.items():
        path = folder / f"{name}.beton"
        with BetonWriter(path, len(images)) as writer:
            for sample in track(_encode_samples(images, options), f"encoding {name}", len(images)):
                if isinstance(sample, BadImage):
                    bad.append(sample)
                    say(f"bad image {sample.path}: {sample.reason}")
                    continue
                writer.write(sample.image, sample.label)
                sides |= {sample.image.height, sample.image.width}
                if name == "train":
                    moments += sample.moments
        if not writer.num_samples:
            raise DataError(f"{dataset.description}: no good image in {name}")
        if name == "train":
            moments /= writer.num_samples
        files[name] = _describe(path, writer.num_samples)
    if bad and not options.skip_bad:
        first = bad[0]
        raise DataError(
            f"{len(bad):,} bad images, listed above, the first {first.path} ({first.reason}); "
            "mend or remove them, or leave them out with --skip-bad"
        )
    if bad:
        lines = "".join(f"{image.path}\t{image.reason}\n" for image in bad)
        (folder / SKIPPED_FILE_NAME).write_text(lines, encoding="utf-8", errors="surrogateescape")
    variance = moments[1] - moments[0] ** 2  # may come out below zero where all pixels are alike
    info = DatasetInfo(
        source=dataset.description,
        encoding=encoding,
        classes=dataset.classes,
        min_side_px=min(sides),
        max_side_px=max(sides),
        fixed_side_px=max(sides) if len(sides) == 1 else None,
        mean=tuple(moments[0].round(6)),
        std=tuple(np.sqrt(variance.clip(min=MIN_STD**2)).round(6)),
        splits=files,
    )
    (folder / FILE_NAME).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
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


def _encode_samples(images: Images, options: Options) -> Iterator[Sample | BadImage]:
    """Encode in order; files in worker processes, so that the file's bytes do not depend on how many there are."""
    workers = options.workers or len(os.sched_getaffinity(0))
    chunks = (
        (images.items[start : start + _CHUNK], images.labels[start : start + _CHUNK], start, options.storage)
        for start in range(0, len(images), _CHUNK)
    )
    if images.items.dtype != object or workers == 1:
        for chunk in chunks:
            yield from _encode_chunk(*chunk)
        return
    pending: deque[Future[list[Sample | BadImage]]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker, (os.getpid(),))
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_chunk, *chunk))
            if len(pending) > workers * _CHUNKS_AHEAD:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process of the encoding died; is there enough memory? try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop.end_with(parent)


def _encode_chunk(
    items: NDArray[Any], labels: NDArray[np.int64], start: int, storage: Storage
) -> list[Sample | BadImage]:
    return [
        encode_sample(item, int(label), start + offset, storage)
        for offset, (item, label) in enumerate(zip(items, labels, strict=True))
    ]
