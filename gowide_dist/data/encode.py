"""`gowide encode`: a dataset in its usual form on disk becomes train.beton, val.beton and dataset.json."""

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
    FASHION_MNIST_ROOT,
    ImageList,
    SourceDataset,
    SplitName,
    check_utf8,
    read_cifar,
    read_fashion_mnist,
    read_ffcv,
    read_image_folder,
    stratified,
)
from gowide_dist.errors import DataError
from gowide_dist.files import PARTIAL, replacing, sha256, try_lock, writing_to
from gowide_dist.progress import say, track

SKIPPED_FILE_NAME, LOCK_FILE_NAME = "skipped.txt", ".lock"
MIN_STD = 1 / 255  # of a constant channel: images are divided by it

_CHUNK = 8  # files that a worker is sent at a time; raw ones take up to 8 MB each
_CHUNKS_AHEAD = 4  # for each worker

READERS: dict[str, Callable[[Path], SourceDataset]] = {
    "fashion-mnist": read_fashion_mnist,
    "cifar10": partial(read_cifar, num_classes=10),
    "cifar100": partial(read_cifar, num_classes=100),
    "imagefolder": read_image_folder,
    "ffcv": read_ffcv,
}

Encoding: TypeAlias = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Options:
    """How to encode. Raises DataError for a value out of range.

    jpg_share: the fraction of the images stored as JPEG, of `quality` 1 to 100; the others are stored raw; None, for
    FFCV files alone, leaves every image as it is. max_side_px: larger images are shrunk to it. subset: use only this
    many training images; held_out: this many training images become the validation split, and the dataset's own
    validation split becomes `test`; both stratified by class. skip_bad: leave out files that hold no whole image, and
    list them in skipped.txt. workers: processes that read files, by default one a core.
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
                raise DataError(f"--{name.replace('_', '-')} {value}: give a number above 0")
        for name in ("max_side_px", "quality"):
            if self.jpg_share is None and getattr(self, name) != getattr(Options, name):
                raise DataError(
                    f"--{name.replace('_', '-')}: stored images stay as they are unless --write-mode says how to "
                    "store them"
                )

    @property
    def storage(self) -> Storage:
        """What concerns the single image."""
        return Storage(self.jpg_share, self.quality, self.max_side_px)

    def non_default(self) -> Encoding:
        """The options that change the result, where they differ from their default."""
        default = asdict(Options())
        return {name: value for name, value in asdict(self).items() if value != default[name] and name != "workers"}


def jpg_share_of(dataset: str, write_mode: str | None = None) -> float | None:
    """Options.jpg_share for a `--write-mode` (raw, jpg or a fraction as JPEG), or the default of a dataset.

    Raises DataError for any other text.
    """
    if not write_mode:
        return {"imagefolder": 1.0, "ffcv": None}.get(dataset, 0.0)
    try:
        return float({"raw": "0", "jpg": "1"}.get(write_mode, write_mode))
    except ValueError:
        raise DataError(f"--write-mode {write_mode}: should be raw, jpg or a fraction such as 0.5") from None


def encode(dataset: str, out: Path, root: Path | None = None, options: Options | None = None) -> DatasetInfo:
    """Encode a dataset, one of READERS, into the folder `out`; nothing is done if `out` already holds it.

    root: the dataset's folder; may be left out for fashion-mnist, which is then Debian's package. Raises DataError for
    files that are missing or damaged, and if `out` holds something else; RunError if `out` cannot be written, OSError
    if the disk is full. Nothing is then left under the final names.
    """
    options = options or Options(jpg_share_of(dataset))
    if root is None and dataset == "fashion-mnist":
        root = FASHION_MNIST_ROOT
    if root is None:
        raise DataError(f"encode {dataset}: give the folder of the dataset as --root")
    if options.jpg_share is None and dataset != "ffcv":
        raise DataError(f"encode {dataset}: only FFCV files hold images that can stay as they are; give a --write-mode")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is no folder; choose another --out")
    if out.resolve() == root.resolve():
        raise DataError(f"{out}: is the folder of the images; choose another --out")
    check_utf8(root.resolve())
    encoding: Encoding = {"dataset": dataset, "root": str(root.resolve()), **options.non_default()}
    if info := find_encoded(out, encoding):
        return info
    try:
        source = READERS[dataset](root)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return write_dataset(out, _divide(source, options), encoding, options)


def find_encoded(out: Path, encoding: Encoding) -> DatasetInfo | None:
    """The dataset in `out`, if it is whole and was made by the same `encoding`; None if it must be made.

    Raises DataError if `out` holds a dataset of another `encoding`.
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


def _divide(dataset: SourceDataset, options: Options) -> SourceDataset:
    """Hold out the validation split, then take the subset of the training images, as the options say."""
    splits = dict(dataset.splits)
    for option, count in (("held-out", options.held_out), ("subset", options.subset)):
        train = splits["train"]
        if count is None:
            continue
        if count >= len(train) + (option == "subset"):
            raise DataError(f"--{option} {count:,}: there are {len(train):,} training images")
        chosen = stratified(train.labels, count)
        if option == "held-out":
            if "val" in splits:
                splits["test"] = splits["val"]
            splits["val"] = train.take(np.flatnonzero(chosen))
            chosen = ~chosen
        splits["train"] = train.take(np.flatnonzero(chosen))
    if "val" not in splits:
        raise DataError(f"{dataset.description}: no validation images; --held-out takes some of the training images")
    return SourceDataset(dataset.description, dataset.classes, splits)


def write_dataset(out: Path, dataset: SourceDataset, encoding: Encoding, options: Options) -> DatasetInfo:
    """Write the files of a dataset into a folder in `out`, then move them up, dataset.json last: it makes the dataset.

    Raises DataError if an image is bad, another process is encoding into `out`, or it holds files that were not encoded
    there; RunError or OSError if it cannot be written. A folder `out` that is new is then removed.
    """
    is_new = not out.exists()
    with writing_to(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
        with try_lock(out / LOCK_FILE_NAME) as locked:
            if not locked:
                raise DataError(f"{out}: another process is encoding into it; wait for it, or choose another --out")
            try:
                _check_unclaimed(out)
                with replacing(out, marker=FILE_NAME) as folder:
                    return _write_files(folder, dataset, encoding, options)
            except BaseException:
                if is_new:
                    shutil.rmtree(out, ignore_errors=True)
                raise


def _check_unclaimed(out: Path) -> None:
    """Raises DataError if `out` holds FFCV files that neither a finished nor a killed encode has left there."""
    betons = sorted(path.name for path in out.glob("*.beton"))
    if betons and not (out / FILE_NAME).exists() and not (out / PARTIAL).exists():
        raise DataError(f"{out}: holds {betons[0]}, which was not encoded there; move it, or choose another --out")


def _write_files(folder: Path, dataset: SourceDataset, encoding: Encoding, options: Options) -> DatasetInfo:
    sides: set[int] = set()
    moments = np.zeros((2, 3))
    bad: list[BadImage] = []
    splits: dict[SplitName, Split] = {}
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
        num_samples = writer.num_samples
        if not num_samples:
            raise DataError(f"{dataset.description}: no good image in {name}")
        if name == "train":
            moments /= num_samples
        splits[name] = Split(
            file=path.name,
            samples=num_samples,
            bytes=path.stat().st_size,
            checksum=sha256(path),
            index_checksum=index_checksum(read_index(path, num_samples)),
        )
    if bad and not options.skip_bad:
        raise DataError(
            f"{len(bad):,} bad images, listed above, the first {bad[0].path} ({bad[0].reason}); "
            "mend or remove them, or leave them out with --skip-bad"
        )
    if bad:
        lines = "".join(f"{image.path}\t{image.reason}\n" for image in bad)
        (folder / SKIPPED_FILE_NAME).write_text(lines, encoding="utf-8", errors="surrogateescape")
    variance = moments[1] - moments[0] ** 2  # rounding may make it negative where all pixels are alike
    info = DatasetInfo(
        source=dataset.description,
        encoding=encoding,
        classes=dataset.classes,
        min_side_px=min(sides),
        max_side_px=max(sides),
        fixed_side_px=max(sides) if len(sides) == 1 else None,
        mean=tuple(moments[0].round(6)),
        std=tuple(np.sqrt(variance.clip(min=MIN_STD**2)).round(6)),
        splits=splits,
    )
    (folder / FILE_NAME).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return info


def _encode_samples(images: ImageList, options: Options) -> Iterator[Sample | BadImage]:
    """Encode in the order given, files in worker processes: the bytes written do not depend on their number."""
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
