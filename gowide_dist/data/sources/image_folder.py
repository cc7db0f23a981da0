"""Class folders: SPLIT/CLASS/**/IMAGE, as torchvision's ImageFolder has them. Links are followed."""

import mimetypes
import os
import unicodedata
from collections.abc import Iterator
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from gowide_dist.data.sources import (
    SPLIT_NAMES,
    UNKNOWN_SIZE,
    ImageList,
    Lister,
    SourceDataset,
    SplitName,
    contents,
    listed,
    say_left_out,
)
from gowide_dist.data.sources.labels import Entry, find_labels, label_flat
from gowide_dist.errors import DataError
from gowide_dist.progress import say
from gowide_dist.schema import nearest

_MANY_CLASSES = 20  # with more, an error names a few
_nfc = partial(unicodedata.normalize, "NFC")
_THREADS = 16  # that list folders: a file server answers many at once
_DROPPINGS = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"}  # folders of systems
_NO_IMAGES = {
    ".db", ".ini", ".lnk", ".aae", ".xmp", ".thm", ".log", ".yaml", ".yml", ".toml", ".lock", ".md5", ".sha1",
    ".sha256", ".npy", ".npz", ".pkl", ".pt", ".pth", ".parquet", ".tfrecord", ".lmdb", ".mat", ".url", ".sqlite",
    ".ipynb", ".cfg", ".part", ".tmp", ".bak", ".crdownload", ".beton", ".ffcv",
}  # fmt: skip
_DROPPED_ENDS = ("~", ":zone.identifier", "icon\r")  # of editors, of Windows through WSL, of macOS
_TYPES = mimetypes.MimeTypes()  # Python's own: a machine's would make the result differ between machines


class _Folder(NamedTuple):
    """A folder of a class. files: name, size in bytes and time of change of each. left_out: names of no images."""

    path: str
    identity: tuple[int, int]
    files: list[tuple[str, int, int]]
    left_out: list[str]


def is_no_image(name: str, *, is_folder: bool = False) -> bool:
    """Whether a file or folder certainly holds no image, by its name: hidden, another kind, or a system's dropping."""
    if name.startswith(".") or is_folder:
        return name.startswith(".") or name.lower() in _DROPPINGS
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
    kind = _TYPES.guess_type(f"a{suffix}")[0]
    return (
        suffix in _NO_IMAGES
        or name.lower().endswith(_DROPPED_ENDS)
        or (kind is not None and not kind.startswith("image/") and suffix not in Image.registered_extensions())
    )


def split_folders(root: Path) -> dict[SplitName, Path]:
    """The folders of the splits, by any of their usual names. Raises DataError if two have names of the same one."""
    entries = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []
    folders: dict[SplitName, Path] = {}
    for split, names in SPLIT_NAMES.items():
        matching = [name for name in entries if name.lower() in names]
        if len(matching) > 1:
            raise DataError(f"{root}: both {matching[0]}/ and {matching[1]}/; leave one")
        if matching:
            folders[split] = root / matching[0]
    return folders


def read_image_folder(root: Path, val_labels: Path | None = None) -> SourceDataset:
    """Folders train/, val/ (optional) and test/ (optional) of class folders; files that are no images are left out.

    A folder val/ without class folders has its labels in a file: `val_labels`, or one that lies beside the images.
    Raises DataError for missing or empty folders, for classes that only val/ or test/ has, and for links to folders
    that count already.
    """
    folders = split_folders(root)
    if "train" not in folders:
        raise DataError(
            f"{root / 'train'}: not found ({contents(root)}); images go into {root}/train/CLASS/ and "
            f"{root}/val/CLASS/; --held-out N makes up for a val/ that is not there"
        )
    classes, train = list_train(folders["train"])
    splits: dict[SplitName, ImageList] = {"train": train.shuffled()}
    for split in ("val", "test"):
        if split in folders and (images := list_split(folders[split], classes, [root], split, val_labels)):
            splits[split] = images
    if "val" in folders and folders["val"].samefile(folders["train"]):
        say(f"note: {folders['val']}: is the folder of the training images: accuracies will be those of training")
    return SourceDataset(f"image folder {root}", classes, splits)


def list_train(folder: Path) -> tuple[tuple[str, ...], ImageList]:
    """The names of the classes and the images of a folder of class folders. Raises DataError for an empty one."""
    classes, beside = _entries(folder)
    if not classes:
        raise DataError(f"{folder}: no class folders in it; images go into {folder}/CLASS/")
    if beside:
        say(f"note: {folder}: left out {len(beside):,} files beside the class folders: {listed(beside)}")
    images = _list_classes(folder, classes)
    if empty := sorted(set(range(len(classes))) - set(images.labels.tolist())):
        names = ", ".join(classes[label] for label in empty[:5])
        raise DataError(f"{folder}: {len(empty)} class folders without images ({names}); remove or fill them")
    return classes, images


def list_split(
    folder: Path, classes: tuple[str, ...], beside: list[Path], split: SplitName, val_labels: Path | None
) -> ImageList | None:
    """The images of a folder of class folders, or of a flat one with labels in a file, which may be in `beside`.

    Returns None for a flat test/ without labels. Raises DataError for classes that training lacks, and for val/ without
    images or labels.
    """
    names, files = _entries(folder)
    if names == ("images",) and "images" not in classes:  # Tiny-ImageNet's val/images/
        beside, folder = [folder, *beside], folder / "images"
        names, files = _entries(folder)
    if names and not (split == "val" and val_labels):
        spelt, unknown = _match(names, classes)
        if unknown:
            raise DataError(f"{folder}: class folder {unknown[0]} is none of training's, {_known(unknown[0], classes)}")
        if files:
            say(f"note: {folder}: left out {len(files):,} files beside the class folders: {listed(files)}")
        images = _list_classes(folder, spelt)
        if not len(images):
            raise DataError(f"{folder}: no images; fill it, or remove it and use --held-out")
        return images
    if names:
        raise DataError(f"{folder}: has class folders, and --val-labels is for one that has not; leave it out")
    if not files:
        raise DataError(f"{folder}: no images; fill it, or remove it and use --held-out")
    where = val_labels if split == "val" else None
    labels = find_labels([folder, *beside], where) if split == "val" or where else None
    if labels is None and split == "test":
        say(f"note: {folder}: {len(files):,} images without class folders: left out")
        return None
    if labels is None:
        raise DataError(
            f"{folder}: no class folders in it, but {len(files):,} images; give the file of their labels as "
            "--val-labels: lines of name and class, or ImageNet's devkit"
        )
    entries = [Entry(name, *_size_and_time(folder / name)) for name in files if name != labels.name]
    return label_flat(folder, entries, labels, classes)


def _known(name: str, classes: tuple[str, ...]) -> str:
    """A hint at the classes that there are, for a name that is none of them."""
    return nearest(name, classes) if len(classes) <= _MANY_CLASSES else f"such as {', '.join(classes[:3])}"


def read_labelled_folder(folder: Path, classes: tuple[str, ...]) -> ImageList:
    """The images of class folders, labelled by the folders' names; any of `classes` may be absent.

    Raises DataError for a folder that is none of them, and if there are no images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; it should hold a folder of images for each class")
    names, _ = _entries(folder)
    if not names:
        raise DataError(f"{folder}: no class folders in it ({contents(folder)}); images go into {folder}/CLASS/")
    spelt, unknown = _match(names, classes)
    if unknown:
        inside = next((f"; or give {path}" for split, path in split_folders(folder).items() if split != "train"), "")
        raise DataError(
            f"{folder}: class folder {unknown[0]} is none of the network's {len(classes):,} classes, "
            f"{_known(unknown[0], classes)}{inside}"
        )
    if not len(images := _list_classes(folder, spelt)):
        raise DataError(f"{folder}: no images in its class folders")
    return images


def _match(folders: tuple[str, ...], classes: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The folder of each class, and the folders of none.

    A Mac spells an accent as a letter of its own (NFD); a class with a slash, as T-shirt/top, is a folder in a folder.
    """
    by_name = {_nfc(name): name for name in folders}
    outermost = {_nfc(name).partition("/")[0] for name in classes}
    return tuple(by_name.get(_nfc(name), name) for name in classes), [
        name for alike, name in by_name.items() if alike not in outermost
    ]


def _entries(folder: Path) -> tuple[tuple[str, ...], list[str]]:
    """The names of the folders and of the images in a folder, sorted."""
    folders: list[str] = []
    files: list[str] = []
    for entry in os.scandir(folder):
        if not is_no_image(entry.name, is_folder=entry.is_dir()):
            (folders if entry.is_dir() else files).append(entry.name)
    spelt: dict[str, str] = {}
    for name in folders:
        if spelt.setdefault(_nfc(name), name) != name:
            raise DataError(f"{folder}: two folders are called {_nfc(name)}, in different Unicode forms; make them one")
    return tuple(sorted(folders)), sorted(files)


def _list_classes(folder: Path, classes: tuple[str, ...]) -> ImageList:
    """The images of class folders in `folder`; it need not have every class. Raises DataError for a loop of links."""
    inside = tuple(_identity(path) for path in (folder, *folder.resolve().parents))
    lister, seen, left_out = Lister(), dict.fromkeys(inside, str(folder)), []

    def list_class(name: str) -> list[_Folder]:
        path = folder / name
        return list(_walk(str(path), inside)) if path.is_dir() else []

    with ThreadPool(_THREADS) as pool:
        batches = (classes[start : start + _THREADS] for start in range(0, len(classes), _THREADS))
        for label, found in enumerate(chain.from_iterable(pool.map(list_class, batch, 1) for batch in batches)):
            for part in found:
                if (other := seen.setdefault(part.identity, part.path)) != part.path:
                    raise DataError(f"{part.path}: the same folder as {other}: its images would count twice; remove it")
                left_out += [os.path.relpath(os.path.join(part.path, name), folder) for name in sorted(part.left_out)]  # noqa: PTH118
                lister.place(part.path)
                for name, size, mtime_ns in part.files:
                    lister.add(name, label, size, mtime_ns)
    hidden = sorted(entry.name for entry in os.scandir(folder) if is_no_image(entry.name, is_folder=entry.is_dir()))
    say_left_out(folder, [*hidden, *left_out])
    return lister.finish()


def _walk(path: str, inside: tuple[tuple[int, int], ...]) -> Iterator[_Folder]:
    """A folder and those in it. inside: the identities of the folders that it is in."""
    identity = _identity(Path(path))
    if identity in inside:
        raise DataError(f"{path}: a link to a folder that it is in: its images would count many times; remove it")
    found, folders = _Folder(path, identity, [], []), []
    for entry in os.scandir(path):
        is_folder = entry.is_dir()
        if is_no_image(entry.name, is_folder=is_folder):
            found.left_out.append(entry.name)
        elif is_folder:
            folders.append(entry.path)
        else:
            found.files.append((entry.name, *_size_and_time(entry)))
    yield found
    for folder in sorted(folders):
        yield from _walk(folder, (*inside, identity))


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _size_and_time(file: "os.DirEntry[str] | Path") -> tuple[int, int]:
    """In bytes and nanoseconds; UNKNOWN_SIZE for a link to nothing."""
    try:
        status = file.stat()
    except OSError:
        return UNKNOWN_SIZE, 0
    return status.st_size, status.st_mtime_ns
