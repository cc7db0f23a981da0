"""ImageNet (ILSVRC 2012) in any of the forms in which people hold it."""

from collections.abc import Callable
from pathlib import Path

from gowide_dist.data.sources import ImageList, SourceDataset, SplitName, contents
from gowide_dist.data.sources.image_folder import is_no_image, list_split, list_train, split_folders
from gowide_dist.data.sources.labels import find_labels, label_flat
from gowide_dist.data.sources.parquet import parquet_files, read_parquet
from gowide_dist.data.sources.tars import list_archive, list_class_archives
from gowide_dist.data.sources.webdataset import read_webdataset, shards
from gowide_dist.errors import DataError
from gowide_dist.progress import say

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")  # below the root, or below what lies in it


def read_imagenet(root: Path, val_labels: Path | None = None) -> SourceDataset:
    """Find out which form `root` holds, and say it.

    Class folders (train/WNID, val/WNID); the official archives, unextracted; val/ flat, its labels in the devkit or a
    file; Kaggle's CLS-LOC; parquet; WebDataset shards. Raises DataError if it is none.
    """
    if not root.is_dir():
        raise DataError(f"{root}: not found, or no folder")
    folder = next((root / path for path in _KAGGLE if (root / path).is_dir()), root)
    folders = split_folders(folder)
    unpacked: dict[SplitName, Path] = {"train": folder / Path(_TRAIN_TAR).stem, "val": folder / Path(_VAL_TAR).stem}
    folders = {split: path for split, path in unpacked.items() if path.is_dir()} | folders
    has_classes = (folder / _TRAIN_TAR).exists() or ("train" in folders and _is_by_class(folders["train"]))
    if has_classes:
        return _read_classes(root, folder, folders, val_labels)
    readers: dict[str, tuple[Callable[[Path], object], Callable[[Path], SourceDataset]]] = {
        "parquet": (parquet_files, read_parquet), "WebDataset": (shards, read_webdataset),
    }  # fmt: skip
    for name, (files, read) in readers.items():
        for place in (root, root / "data"):
            if place.is_dir() and files(place):
                say(f"{root}: {name} files")
                if val_labels is not None:
                    raise DataError(f"{root}: has its labels with its images; leave out --val-labels")
                return read(place)
    raise DataError(
        f"{root}: no form of ImageNet that is known here ({contents(root)}); it has "
        f" train/WNID/ and val/, {_TRAIN_TAR} and {_VAL_TAR}, parquet files or WebDataset shards"
    )


def _is_by_class(train: Path) -> bool:
    """Whether a folder holds class folders, or an archive WNID.tar for each class, and not shards or parquet files."""
    archives = [*train.glob("*.tar")]
    if _class_folders(train):
        if missing := sorted({path.stem for path in archives} - _class_folders(train)):
            raise DataError(
                f"{train}: class folders, and {missing[0]}.tar, which is not unpacked; unpack it or remove it"
            )
        return True
    wnids = all(path.stem[:1] == "n" and path.stem[1:].isdecimal() for path in archives)
    return wnids if archives else not any(train.glob("*.parquet"))


def _class_folders(train: Path) -> set[str]:
    return {path.name for path in train.iterdir() if path.is_dir() and not is_no_image(path.name, is_folder=True)}


def _read_classes(root: Path, folder: Path, folders: dict[SplitName, Path], val_labels: Path | None) -> SourceDataset:
    """Training images by class: folders, or archives; validation images in class folders, flat, or in an archive."""
    train_tar, val_tar = folder / _TRAIN_TAR, folder / _VAL_TAR
    if "train" in folders and not _class_folders(folders["train"]) and any(folders["train"].glob("*.tar")):
        train_tar = folders["train"]
    is_packed = train_tar == folders.get("train") or ("train" not in folders and train_tar.exists())
    say(f"{root}: training images in {'archives by class' if is_packed else 'class folders'}")
    for split, archive in (("train", train_tar), ("val", val_tar)):
        if split in folders and archive.is_file():  # that may have stopped half-way
            say(f"note: {archive}: left out; the images are taken from {folders[split]}")
    classes, train = list_class_archives(train_tar) if is_packed else list_train(folders["train"])
    splits: dict[SplitName, ImageList] = {"train": train.shuffled()}
    # Kaggle's csv lies above ILSVRC/Data/CLS-LOC, wherever in there the root is.
    depth = 3 if folder.resolve().name == _KAGGLE[-1] else 0
    beside = [folder, *folder.resolve().parents[:depth]]
    if "val" in folders:
        images = list_split(folders["val"], classes, beside, "val", val_labels)
        assert images is not None, "of val, list_split raises"
        splits["val"] = images
    elif val_tar.exists():
        if (labels := find_labels(beside, val_labels)) is None:
            raise DataError(f"{val_tar}: its labels are in the devkit (ILSVRC2012_devkit_t12.tar.gz); put it beside")
        splits["val"] = label_flat(val_tar, list_archive(val_tar), labels, classes)
    if "test" in folders:
        say(f"note: {folders['test']}: left out; ImageNet's test images have no public labels")
    return SourceDataset(f"ImageNet from {root}", classes, splits)
