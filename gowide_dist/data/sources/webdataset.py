"""WebDataset shards: tar archives of KEY.jpg, KEY.cls and so on (https://github.com/webdataset/webdataset)."""

from pathlib import Path, PurePath

from gowide_dist.data.sources import (
    Lister,
    SourceDataset,
    SplitName,
    classes_of_texts,
    contents,
    listed,
    say_left_out,
    shard_files,
)
from gowide_dist.data.sources.labels import Entry
from gowide_dist.data.sources.tars import members
from gowide_dist.errors import DataError

_IMAGES = {"jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff"}
_LABELS = {"cls", "class", "label"}


def shards(root: Path) -> dict[SplitName, list[Path]]:
    """The shards of each split."""
    return shard_files(root, "tar")


def read_webdataset(root: Path) -> SourceDataset:
    """Shards in `root` or its folders, whose paths name their split; a label is a number or the name of a class.

    Class names are else the lines of classes.txt in `root`, if there is one. Raises DataError for damaged or compressed
    shards, and for images without a label.
    """
    numbers: dict[str, int] = {}
    listers: dict[SplitName, Lister] = {}
    for split, paths in shards(root).items():
        listers[split] = Lister()
        for path in paths:
            listers[split].place(path)
            for key, (entry, label) in _samples(path).items():
                number = numbers.setdefault(label, len(numbers))
                listers[split].add(PurePath(key).name, number, entry.size, entry.mtime_ns, entry.offset or 0)
    if "train" not in listers:
        raise DataError(f"{root}: no shards train*.tar in it ({contents(root)})")
    classes, relabel = classes_of_texts(numbers, root / "classes.txt")
    splits = {split: lister.finish(relabel) for split, lister in listers.items()}
    splits["train"] = splits["train"].shuffled()
    return SourceDataset(f"WebDataset shards in {root}", classes, splits)


def _samples(path: Path) -> dict[str, tuple[Entry, str]]:
    """The image and the label of each sample of a shard."""
    images: dict[str, Entry] = {}
    labels: dict[str, str] = {}
    others: dict[str, None] = {}  # extensions
    with path.open("rb") as file:
        for entry in members(path):
            name = PurePath(entry.name)
            base, _, extension = name.name.partition(".")
            key = str(name.with_name(base)) if base else ""
            if key and extension.lower() in _IMAGES:
                if key in images:
                    raise DataError(f"{path}: two images of the key {key}")
                images[key] = entry
            elif key and extension.lower() in _LABELS:
                file.seek(entry.offset or 0)
                if text := file.read(entry.size).decode(errors="replace").strip():
                    labels[key] = text
            else:
                others[f"KEY.{extension}"] = None
    there = f" ({listed([*others])} is not read)" if others else ""
    if unlabelled := sorted(images.keys() - labels.keys()):
        names = f"{len(unlabelled):,} of {len(images):,} images have no label KEY.cls: {listed(unlabelled)}"
        raise DataError(f"{path}: {names}{there}")
    if not images:
        raise DataError(f"{path}: no images KEY.jpg in it{there}")
    say_left_out(path, sorted(labels.keys() - images.keys()), "labels without an image")
    return {key: (entry, labels[key]) for key, entry in images.items()}
