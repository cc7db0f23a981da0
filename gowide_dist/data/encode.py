"""`gowide encode`: a dataset in its usual form on disk becomes train.beton, val.beton and dataset.json."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import ImageColor

from gowide_dist.data.beton import Beton
from gowide_dist.data.images import BadImage, Sample, Storage, encode_sample, image_key
from gowide_dist.data.info import FILE_NAME, DatasetInfo, Split, read_dataset_info
from gowide_dist.data.partial import SplitFile
from gowide_dist.data.sources import SPLIT_NAMES, FileList, ImageList, SourceDataset, SplitName, stratified
from gowide_dist.data.sources.cifar import read_cifar
from gowide_dist.data.sources.fashion_mnist import FASHION_MNIST_ROOT, read_fashion_mnist
from gowide_dist.data.sources.ffcv import read_ffcv
from gowide_dist.data.sources.image_folder import read_image_folder
from gowide_dist.data.sources.imagenet import read_imagenet
from gowide_dist.data.sources.parquet import read_parquet
from gowide_dist.data.sources.webdataset import read_webdataset
from gowide_dist.data.tally import Tally, say_counts
from gowide_dist.data.workers import encode_images
from gowide_dist.errors import DataError
from gowide_dist.files import PARTIAL, move_up, try_lock, writing_to
from gowide_dist.progress import one_line, say, track

SKIPPED_FILE_NAME, LOCK_FILE_NAME = "skipped.txt", ".lock"

_LEAST_MEASURED_SHARE, _LEAST_MEASURED = 1 / 8, 256  # of images that are kept as they are

READERS: dict[str, Callable[[Path], SourceDataset]] = {
    "fashion-mnist": read_fashion_mnist,
    "cifar10": partial(read_cifar, num_classes=10),
    "cifar100": partial(read_cifar, num_classes=100),
    "imagefolder": read_image_folder,
    "imagenet": read_imagenet,
    "tiny-imagenet": read_image_folder,
    "parquet": read_parquet,
    "webdataset": read_webdataset,
    "ffcv": read_ffcv,
}
_WITH_VAL_LABELS = {"imagefolder": read_image_folder, "imagenet": read_imagenet, "tiny-imagenet": read_image_folder}
_PIXELS = {"fashion-mnist", "cifar10", "cifar100"}  # without files of images that could be kept

Encoding: TypeAlias = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Options(Storage):
    """How to encode. Raises DataError for values that mean nothing.

    subset: use only this many training images; held_out: this many training images become the validation split, and the
    dataset's own validation split becomes `test`; both stratified by class. skip_bad: leave out files that hold no
    whole image, and list them in skipped.txt. workers: processes that read files, by default one a core. val_labels:
    the file with the labels of validation images that are not in class folders.
    """

    subset: int | None = None
    held_out: int | None = None
    skip_bad: bool = False
    workers: int = 0
    val_labels: str | None = None

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise DataError(
                f"--background {self.background}: should be a colour, as white, grey or '#ff8000'"
            ) from None

    @property
    def storage(self) -> Storage:
        return Storage(**{field.name: getattr(self, field.name) for field in fields(Storage)})

    def non_default(self) -> Encoding:
        """The options that change the result, where they differ from their default."""
        default = vars(Options())
        return {name: value for name, value in vars(self).items() if value != default[name] and name != "workers"}


def jpg_share_of(dataset: str, write_mode: str | None = None) -> float | None:
    """Options.jpg_share for a `--write-mode` (raw, jpg, keep or a fraction as JPEG), or the default of a dataset."""
    if not write_mode:
        return None if dataset == "ffcv" else 0.0 if dataset in _PIXELS else 1.0
    if write_mode == "keep":
        return None
    try:
        jpg_share = float({"raw": "0", "jpg": "1"}.get(write_mode, write_mode))
    except ValueError:
        jpg_share = math.nan
    if not 0 <= jpg_share <= 1:
        raise DataError(f"--write-mode {write_mode}: should be raw, jpg or a fraction from 0 to 1, or keep")
    return jpg_share


def encode(dataset: str, out: Path, root: Path | None = None, options: Options | None = None) -> DatasetInfo:
    """Encode a dataset, one of READERS, into the folder `out`; nothing is done if `out` already holds it.

    root: the dataset's folder; may be left out for fashion-mnist, which is then Debian's package. Raises DataError for
    files that are missing or damaged, and if `out` holds something else; RunError if `out` cannot be written, OSError
    if the disk is full. What is encoded by then stays in a hidden folder, and the same call goes on from there.
    """
    options = options or Options(jpg_share_of(dataset))
    root = root or (FASHION_MNIST_ROOT if dataset == "fashion-mnist" else None)
    if root is None:
        raise DataError(f"encode {dataset}: give the folder of the dataset as --root")
    if options.jpg_share is None and dataset in _PIXELS:
        raise DataError(f"encode {dataset}: holds pixels, and no images that can be kept; give another --write-mode")
    if options.jpg_share is None and dataset == "ffcv" and (options.quality != Options.quality or options.max_side_px):
        raise DataError("--quality and --max-side-px need a --write-mode: without, stored images stay as they are")
    read = READERS[dataset]
    if options.val_labels:
        if dataset not in _WITH_VAL_LABELS:
            raise DataError(f"encode {dataset}: has its labels with its images; leave out --val-labels")
        read = partial(_WITH_VAL_LABELS[dataset], val_labels=Path(options.val_labels))
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is not a folder; choose another --out")
    _refuse_among_images(out, root)
    if options.jpg_share == 0 and options.quality != Options.quality:
        say(f"note: --quality {options.quality}: changes nothing, for no image is stored as JPEG")
    encoding: Encoding = {"dataset": dataset, "root": str(root.resolve()), **options.non_default()}
    if info := find_encoded(out, encoding):
        return info
    try:
        source = read(root)
        for name in (str(root.resolve()), *source.classes):
            name.encode()  # dataset.json will hold it
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except UnicodeEncodeError as error:
        raise DataError(f"{error.object!a} in {root}: the name is not valid UTF-8; rename it") from None
    return write_dataset(out, _divide(source, options), encoding, options)


def _refuse_among_images(out: Path, root: Path) -> None:
    """Raises DataError for a folder that the next encode would take for a class."""
    if out.resolve() == root.resolve():
        raise DataError(f"{out}: is the folder of the images; choose another --out")
    if out.resolve().is_relative_to(root.resolve()):
        split = out.resolve().relative_to(root.resolve()).parts[0]
        if any(split.lower() in names for names in SPLIT_NAMES.values()):
            raise DataError(f"{out}: is among the images of {root / split}; choose another --out")


def find_encoded(out: Path, encoding: Encoding) -> DatasetInfo | None:
    """The dataset in `out`, if it is whole and was made by the same `encoding`; None if it must be made.

    Raises DataError if `out` holds a dataset of another `encoding`, and names what differs.
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
        default = vars(Options())
        old, new = ({**default, **made_by} for made_by in (info.encoding, encoding))
        differences = ", ".join(
            f"{name} {old.get(name)}, not {new.get(name)}" for name in old | new if old.get(name) != new.get(name)
        )
        raise DataError(f"{out}: holds another dataset ({differences}); remove it or choose another --out")
    say(f"{out}: already encoded ({info.summary}); nothing to do. If images have changed since, remove it")
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
        chosen = stratified(train.labels, count)
        if option == "held-out":
            if {"val", "test"} <= {*splits}:
                raise DataError("--held-out: there are images for val and for test already; leave it out")
            if "val" in splits:
                splits["test"] = splits["val"]
            splits["val"] = train.take(chosen)
            chosen = ~chosen
        splits["train"] = train.take(chosen)
    if "val" not in splits:
        none = "no validation images, but test images" if "test" in splits else "no validation images"
        raise DataError(f"{dataset.description}: {none}; --held-out takes some of the training images")
    return replace(dataset, splits=splits)


def write_dataset(out: Path, dataset: SourceDataset, encoding: Encoding, options: Options) -> DatasetInfo:
    """Write the files of a dataset into a folder in `out`, then move them up, dataset.json last: it makes the dataset.

    Raises DataError if an image is bad, another process is encoding into `out`, or it holds files that were not encoded
    there; RunError or OSError if it cannot be written. The folder in `out` then stays if it holds an image.
    """
    is_new = not out.exists()
    with writing_to(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
        with try_lock(out / LOCK_FILE_NAME) as locked:
            if not locked:
                raise DataError(f"{out}: another process is encoding into it; wait for it, or choose another --out")
            folder = out / PARTIAL
            try:
                betons = sorted(path.name for path in out.glob("*.beton"))
                if betons and not (out / FILE_NAME).exists() and not folder.exists():  # of a killed encode
                    raise DataError(
                        f"{out}: holds {betons[0]}, which was not encoded there; move it, or choose another --out"
                    )
                folder.mkdir(exist_ok=True)
                info = _write_files(folder, dataset, encoding, options)
                move_up(folder, marker=FILE_NAME)
                folder.rmdir()
                return info
            except BaseException:
                if not any(folder.glob("*/")) and not any(path.stat().st_size for path in folder.glob("*.journal")):
                    shutil.rmtree(out if is_new else folder, ignore_errors=True)
                raise


def _write_files(folder: Path, dataset: SourceDataset, encoding: Encoding, options: Options) -> DatasetInfo:
    lists = {name: images.unpacked(folder) for name, images in dataset.splits.items()}
    say_counts(dataset)
    bad = dict.fromkeys(image for images in lists.values() for image in _known_by_listing(images, options))
    if bad and not options.skip_bad:
        say("bad images end the encode when all are known, and it keeps the good ones; --skip-bad leaves them out")
    tally = Tally(options.bits)
    splits: dict[SplitName, Split] = {}
    for name, images in lists.items():
        share = _measured_share(images, options) if name == "train" else 0.0
        with SplitFile(folder, name, len(images)) as file:
            samples = _write_samples(file, images, options, share)
            for index, sample in enumerate(track(samples, f"encoding {name}", len(images))):
                if isinstance(sample, Sample):
                    tally.add(sample, images.items[index])
                elif sample not in bad:
                    bad[sample] = None
                    say(f"bad image {sample.path}: {sample.reason}")
            if not file.num_samples:
                raise DataError(f"{dataset.description}: no good image in {name}")
            splits[name] = file.finish()
    tally.check_peak()
    _refuse(bad, options)
    if options.bits and not tally.num_peaks:
        say(f"note: --bits {options.bits}: changes nothing, for no image has 16 bits a channel")
    if tally.num_composed:
        say(f"note: {tally.num_composed:,} images with transparent pixels, on {options.background} (see --background)")
    if bad:
        lines = "".join(f"{one_line(image.path)}\t{image.reason}\n" for image in bad)
        (folder / SKIPPED_FILE_NAME).write_text(lines, encoding="utf-8", errors="surrogateescape")
    info = DatasetInfo(
        source=dataset.description,
        encoding=encoding,
        classes=dataset.classes,
        min_side_px=min(tally.sides),
        max_side_px=max(tally.sides),
        fixed_side_px=max(tally.sides) if len(tally.sides) == 1 else None,
        mean=tuple(tally.mean_and_std[0].round(6)),
        std=tuple(tally.mean_and_std[1].round(6)),
        splits=splits,
    )
    (folder / FILE_NAME).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if path.name not in {FILE_NAME, SKIPPED_FILE_NAME, *(split.file for split in splits.values())}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return info


def _known_by_listing(images: ImageList, options: Options) -> Iterator[BadImage]:
    """Files that are empty, or no files: bad images that are known before any is decoded."""
    if isinstance(images.items, FileList):
        for index in np.flatnonzero(images.items.rows["size"] <= 0).tolist():
            sample = encode_sample(images.items[index], 0, index, options.storage)
            if isinstance(sample, BadImage):
                say(f"bad image {sample.path}: {sample.reason}")
                yield sample


def _refuse(bad: Iterable[BadImage], options: Options) -> None:
    bad = list(bad)
    if bad and not options.skip_bad:
        raise DataError(
            f"bad images: {len(bad):,}, listed above, first {bad[0].path} ({bad[0].reason}); fix or remove them, or "
            "leave them out with --skip-bad, and run the same command again: it goes on from what is encoded"
        )


def _measured_share(images: ImageList, options: Options) -> float:
    """The fraction of the training images whose pixels count in the mean and standard deviation.

    Those that are kept as they are need not be decoded for anything else: an eighth of them is enough.
    """
    is_kept = options.jpg_share is None and isinstance(images.items, FileList)
    return min(1.0, max(_LEAST_MEASURED_SHARE, _LEAST_MEASURED / len(images))) if is_kept else 1.0


def _write_samples(
    file: SplitFile, images: ImageList, options: Options, measured_share: float
) -> Iterator[Sample | BadImage]:
    """Encode and write the images in order, those that `file` holds from an earlier encode as they are there."""
    storage = options.storage

    def key(index: int) -> str:
        return image_key(images.items[index], index, storage, measured_share)

    found = np.full(len(images), -1)
    if file.earlier:
        found = file.find(map(key, range(len(images))))
        say(f"{(found >= 0).sum():,} of {len(images):,} images have been encoded before")
    with closing(encode_images(images, np.flatnonzero(found < 0), storage, measured_share, options.workers)) as fresh:
        for index in range(len(images)):
            if found[index] >= 0:
                yield file.take(int(found[index]), int(images.labels[index]))
                continue
            sample = next(fresh)
            if isinstance(sample, Sample):
                file.write(sample, key(index))
            yield sample
