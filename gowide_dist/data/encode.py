"""`gowide encode`: a dataset in its usual form on disk becomes train.beton, val.beton and dataset.json."""

import math
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gowide_dist import stop
from gowide_dist.data import sources
from gowide_dist.data.beton import Beton, BetonWriter
from gowide_dist.data.images import BadImage, Sample, encode_sample
from gowide_dist.data.info import FILE_NAME, DatasetInfo, Split, read_dataset_info
from gowide_dist.data.sources import ImageList, SourceDataset, SplitName
from gowide_dist.errors import DataError
from gowide_dist.files import PARTIAL, replacing, try_lock, writing_to
from gowide_dist.machine import num_cores
from gowide_dist.progress import say, track

SKIPPED_FILE_NAME, LOCK_FILE_NAME = "skipped.txt", ".lock"
MIN_STD = 1 / 255  # of a constant channel: images are divided by it

_CHUNK = 8  # files that a worker is sent at a time; raw ones take up to 8 MB each
_CHUNKS_AHEAD = 4  # for each worker

READERS: dict[str, Callable[[Path], SourceDataset]] = {
    "fashion-mnist": sources.read_fashion_mnist,
    "cifar10": partial(sources.read_cifar, num_classes=10),
    "cifar100": partial(sources.read_cifar, num_classes=100),
    "imagefolder": sources.read_image_folder,
    "ffcv": sources.read_ffcv,
}

Encoding: TypeAlias = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Options:
    """How to encode. Raises DataError for options that need a write mode.

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
        if self.jpg_share is None and (self.quality != Options.quality or self.max_side_px):
            raise DataError("--quality and --max-side-px need a --write-mode: without, stored images stay as they are")

    def non_default(self) -> Encoding:
        """The options that change the result, where they differ from their default."""
        default = vars(Options())
        return {name: value for name, value in vars(self).items() if value != default[name] and name != "workers"}


def jpg_share_of(dataset: str, write_mode: str | None = None) -> float | None:
    """Options.jpg_share for a `--write-mode` (raw, jpg or a fraction as JPEG), or the default of a dataset."""
    if not write_mode:
        return {"imagefolder": 1.0, "ffcv": None}.get(dataset, 0.0)
    try:
        jpg_share = float({"raw": "0", "jpg": "1"}.get(write_mode, write_mode))
    except ValueError:
        jpg_share = math.nan
    if not 0 <= jpg_share <= 1:
        raise DataError(f"--write-mode {write_mode}: should be raw, jpg or a fraction from 0 to 1")
    return jpg_share


def encode(dataset: str, out: Path, root: Path | None = None, options: Options | None = None) -> DatasetInfo:
    """Encode a dataset, one of READERS, into the folder `out`; nothing is done if `out` already holds it.

    root: the dataset's folder; may be left out for fashion-mnist, which is then Debian's package. Raises DataError for
    files that are missing or damaged, and if `out` holds something else; RunError if `out` cannot be written, OSError
    if the disk is full. Nothing is then left under the final names.
    """
    options = options or Options(jpg_share_of(dataset))
    root = root or (sources.FASHION_MNIST_ROOT if dataset == "fashion-mnist" else None)
    if root is None:
        raise DataError(f"encode {dataset}: give the folder of the dataset as --root")
    if options.jpg_share is None and dataset != "ffcv":
        raise DataError(f"encode {dataset}: only FFCV files hold images that can stay as they are; give a --write-mode")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is not a folder; choose another --out")
    if out.resolve() == root.resolve():
        raise DataError(f"{out}: is the folder of the images; choose another --out")
    encoding: Encoding = {"dataset": dataset, "root": str(root.resolve()), **options.non_default()}
    if info := find_encoded(out, encoding):
        return info
    try:
        source = READERS[dataset](root)
        for name in (str(root.resolve()), *source.classes):
            name.encode()  # dataset.json will hold it
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except UnicodeEncodeError as error:
        raise DataError(f"{error.object!a}: the name is not valid UTF-8; rename it") from None
    return write_dataset(out, _divide(source, options), encoding, options)


def find_encoded(out: Path, encoding: Encoding) -> DatasetInfo | None:
    """The dataset in `out`, if it is whole and was made by the same `encoding`; None if it must be made.

    Raises DataError if `out` holds a dataset of another `encoding`.
    """
    if not (out / FILE_NAME).exists():
        return None
    try:
        info = read_dataset_info(out / FILE_NAME)
        for split in info.splits.values() if info.encoding == encoding else ():
            Beton(out / split.file)
    except DataError as error:
        say(f"{error}; encoding now")
        return None
    if info.encoding != encoding:
        options = ", ".join(f"{name} {value}" for name, value in info.encoding.items())
        raise DataError(f"{out}: holds another dataset ({options}); remove it or choose another --out")
    say(f"{out}: already encoded ({info.summary}); nothing to do")
    return info


def _divide(dataset: SourceDataset, options: Options) -> SourceDataset:
    """Hold out the validation split, then take the subset of the training images, as the options say."""
    splits = dict(dataset.splits)
    for option, count in (("held-out", options.held_out), ("subset", options.subset)):
        if count is None:
            continue
        train = splits["train"]
        if count >= len(train) + (option == "subset"):
            raise DataError(f"--{option} {count:,}: there are {len(train):,} training images")
        chosen = sources.stratified(train.labels, count)
        if option == "held-out":
            if "val" in splits:
                splits["test"] = splits["val"]
            splits["val"] = train.take(chosen)
            chosen = ~chosen
        splits["train"] = train.take(chosen)
    if "val" not in splits:
        raise DataError(f"{dataset.description}: no validation images; --held-out takes some of the training images")
    return replace(dataset, splits=splits)


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
                betons = sorted(path.name for path in out.glob("*.beton"))
                if betons and not (out / FILE_NAME).exists() and not (out / PARTIAL).exists():  # of a killed encode
                    raise DataError(
                        f"{out}: holds {betons[0]}, which was not encoded there; move it, or choose another --out"
                    )
                with replacing(out, marker=FILE_NAME) as folder:
                    return _write_files(folder, dataset, encoding, options)
            except BaseException:
                if is_new:
                    shutil.rmtree(out, ignore_errors=True)
                raise


def _write_files(folder: Path, dataset: SourceDataset, encoding: Encoding, options: Options) -> DatasetInfo:
    sides: set[int] = set()
    moments = np.zeros((2, 3))
    bad: list[BadImage] = []
    splits: dict[SplitName, Split] = {}
    for name, images in dataset.splits.items():
        with (folder / f"{name}.beton").open("wb") as file:
            writer = BetonWriter(file, len(images))
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
            splits[name] = writer.finish()
    moments /= splits["train"].samples
    if bad and not options.skip_bad:
        raise DataError(
            f"bad images: {len(bad):,}, listed above, first {bad[0].path} ({bad[0].reason}); fix or remove "
            "them, or leave them out with --skip-bad"
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
    workers = options.workers or num_cores()
    starts = range(0, len(images), _CHUNK)
    chunks = ((images.take(slice(start, start + _CHUNK)), start, options) for start in starts)
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


def _encode_chunk(images: ImageList, start: int, options: Options) -> list[Sample | BadImage]:
    storage = options.jpg_share, options.quality, options.max_side_px
    samples = zip(images.items, images.labels.tolist(), strict=True)
    return [encode_sample(item, label, index, *storage) for index, (item, label) in enumerate(samples, start)]
