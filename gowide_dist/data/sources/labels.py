"""Labels of images that lie in one folder or archive, in a file of their own: text, Kaggle's csv, ImageNet's devkit."""

import csv
import io
import tarfile
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from gowide_dist.data.sources import ImageList, Lister, label_of_texts, listed
from gowide_dist.errors import DataError
from gowide_dist.progress import say

_USUAL = (  # the first that is there
    "LOC_val_solution.csv", "val_annotations.txt", "*devkit*", "*ground_truth.txt", "*val*label*.[ct][sx][vt]",
    "val.txt", "val.csv", "labels.txt", "labels.csv",
)  # fmt: skip
_META, _GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"


class Entry(NamedTuple):
    """An image of a flat folder or archive. size in bytes; offset: in the archive."""

    name: str
    size: int
    mtime_ns: int
    offset: int | None = None


def find_labels(places: list[Path], given: Path | None) -> Path | None:
    """The file of labels: the `given` one, or one of a usual name in one of the folders, or None.

    Raises DataError if there is none as given, or if a folder has several alike.
    """
    if given:
        if not given.exists():
            raise DataError(f"{given}: not found; give the file of the labels as --val-labels")
        return given
    for pattern in _USUAL:
        for place in places:
            found = sorted(place.glob(pattern))
            if len(found) > 1 and "devkit" not in pattern:  # of a devkit and its archive either will do
                names = listed([path.name for path in found])
                raise DataError(f"{place}: {names} may hold the labels; say which with --val-labels")
            if found:
                say(f"{places[0]}: labels from {found[0]}")
                return found[0]
    return None


def label_flat(place: Path, entries: list[Entry], labels: Path, classes: tuple[str, ...]) -> ImageList:
    """The images of the folder or archive `place` with the labels of a file. Raises DataError if one has none."""
    entries = sorted(entries)
    by_name = read_labels(labels, [entry.name for entry in entries], classes)
    texts = [by_name.get(entry.name) or by_name.get(PurePath(entry.name).stem) for entry in entries]
    if missing := [entry.name for entry, text in zip(entries, texts, strict=True) if text is None]:
        raise DataError(f"{labels}: no label for {len(missing):,} images of {place}: {listed(missing)}")
    if len(by_name) > len(entries):
        say(f"note: {place}: {len(entries):,} images, {labels.name} has labels for {len(by_name):,}")
    lister = Lister()
    lister.place(place)
    _, numbers = label_of_texts([text for text in texts if text is not None], classes, str(labels))
    for entry, number in zip(entries, numbers, strict=True):
        offset = {} if entry.offset is None else {"offset": entry.offset}
        lister.add(entry.name, number, entry.size, entry.mtime_ns, **offset)
    return lister.finish()


def read_labels(path: Path, names: list[str], classes: tuple[str, ...]) -> dict[str, str]:
    """Labels by the images' names, with or without suffix: from lines of name and label, or of the labels alone.

    names: of the images, sorted: lines of labels alone are in this order. Raises DataError if the file is neither.
    """
    if path.name.endswith("ground_truth.txt"):  # numbers of meta.mat, not of sorted names
        path = path.parent
    if path.is_dir() or path.name.endswith((".tar", ".gz", ".tgz")):
        return _read_devkit(path)
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    known = frozenset(classes)
    rows = [_fields(line, known) for line in text.splitlines() if line.strip()]
    if rows and rows[0][0] in ("ImageId", "image", "filename", "name", "file"):
        rows = rows[1:]
    if not rows or len({len(row) for row in rows}) > 1:
        raise DataError(f"{path}: should have lines of name and class, or of the class alone")
    if len(rows[0]) == 2:
        by_name: dict[str, str] = {}
        for name, label in rows:
            if by_name.setdefault(PurePath(name).name, label) != label:
                raise DataError(f"{path}: two labels for {PurePath(name).name}")
        return by_name
    if len(rows) != len(names):
        raise DataError(f"{path}: {len(rows):,} labels without names, for {len(names):,} images")
    return {name: row[0] for name, row in zip(names, rows, strict=True)}


def _fields(line: str, classes: frozenset[str]) -> list[str]:
    """Name and label, or the label alone. What follows the label, as boxes do, is left out."""
    line = line.strip()
    separator = next((mark for mark in ("\t", ",") if mark in line), None)
    name, _, last = line.rpartition(" ")
    if line in classes or (separator is None and name and (last in classes or last.isdecimal())):
        return [line] if line in classes else [name.strip(), last]
    fields = next(csv.reader([line], delimiter=separator)) if separator else line.split(maxsplit=1)
    fields = [field.strip() for field in fields]
    return [*fields[:1], *(field if field in classes else field.split()[0] for field in fields[1:2] if field)]


def _read_devkit(path: Path) -> dict[str, str]:
    """Labels of ImageNet's validation images from its devkit, a folder or an archive.

    Line k of the ground truth is the ILSVRC id of image k; meta.mat has the WordNet id of each. Raises DataError if the
    files are not there, or scipy, which reads meta.mat, is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path}: reading it needs scipy: pip install 'gowide_dist[datasets]'") from None
    try:
        meta, truth = (_read_member(path, name) for name in (_META, _GROUND_TRUTH))
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        ids = [int(line) for line in truth.decode().split()]
        return {f"ILSVRC2012_val_{number:08}": wnids[id_] for number, id_ in enumerate(ids, start=1)}
    except FileNotFoundError as error:
        raise DataError(f"{path}: no {error} in it; give ImageNet's devkit (ILSVRC2012_devkit_t12)") from None
    except Exception as error:  # scipy and tarfile may raise anything on damaged files
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}); get the devkit again") from None


def _read_member(path: Path, name: str) -> bytes:
    """A file of a folder or archive, at any depth. Raises FileNotFoundError."""
    if path.is_dir():
        for found in sorted(found for depth in ("", "data/", "*/data/") for found in path.glob(depth + name)):
            return found.read_bytes()
        raise FileNotFoundError(name)
    with tarfile.open(path) as archive:
        for member in archive:
            if PurePath(member.name).name == name and (file := archive.extractfile(member)):
                return file.read()
    raise FileNotFoundError(name)
