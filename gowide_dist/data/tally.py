"""What is counted while a dataset is encoded, and said about it."""

import numpy as np
from numpy.typing import NDArray

from gowide_dist.data.images import Item, Sample
from gowide_dist.data.sources import SourceDataset, listed
from gowide_dist.errors import DataError
from gowide_dist.progress import say

MIN_STD = 1 / 255  # of a constant channel: images are divided by it

_PEAKS = 100  # images of 16 bits after which it is clear how many bits they use
_MAX_CLASSES_SHOWN = 12  # each with its number of images
_UNEQUAL = 10  # times as many images in one class as in another: said


class Tally:
    """Counts over the samples of all splits. bits: Options.bits; num_peaks: images of 16 bits so far."""

    def __init__(self, bits: int | None):
        self.sides: set[int] = set()
        self._moments, self._num_measured = np.zeros((2, 3)), 0
        self._bits, self._peak, self.num_peaks, self._first = bits, 0, 0, ""
        self.num_composed = 0

    def add(self, sample: Sample, item: Item) -> None:
        self.sides |= {sample.image.height, sample.image.width}
        if not np.isnan(sample.moments[0, 0]):
            self._moments += sample.moments
            self._num_measured += 1
        self.num_composed += sample.composed
        if sample.peak:
            self._peak, self.num_peaks = max(self._peak, sample.peak), self.num_peaks + 1
            self._first = self._first or f" ({item} is one)"
            if self.num_peaks == _PEAKS:
                self.check_peak()

    def check_peak(self) -> None:
        """Raises DataError if the images of 16 bits use fewer, and nobody said how many."""
        if self._bits is None:
            option = "give --bits {}, or the camera's number, or --bits 16 to leave them so"
            check_peak(self.num_peaks, self._peak, option, first=self._first)

    @property
    def mean_and_std(self) -> NDArray[np.float64]:
        """[2, 3], on a scale of 0 to 1."""
        mean, mean_square = self._moments / max(1, self._num_measured)
        variance = mean_square - mean**2  # rounding may make it negative where all pixels are alike
        return np.stack([mean, np.sqrt(variance.clip(min=MIN_STD**2))])


def check_peak(num_images: int, peak: int, option: str, where: str = "", first: str = "") -> None:
    """Raises DataError if images of 16 bits, whose highest value is `peak`, use fewer.

    option: says what to do, with {} for the number of bits; first: names one of the images.
    """
    if num_images and (used := max(9, peak.bit_length())) < 16:
        raise DataError(
            f"{where}{num_images:,} images of 16 bits a channel{first} have values up to {peak:,}: they use {used} "
            f"bits, and would be dark; {option.format(used)}"
        )


def say_counts(dataset: SourceDataset) -> None:
    """Show the number of images of each class, and say where they are very unequal."""
    if len(dataset.classes) == 1:
        say(f"note: {dataset.classes[0]} is the only class: nothing can be learnt; --root may be a folder too high")
    for split, images in dataset.splits.items():
        counts = np.bincount(images.labels, minlength=len(dataset.classes))
        fewest, most = int(np.where(counts, counts, len(images) + 1).argmin()), int(counts.argmax())
        each = ", ".join(f"{name} {count:,}" for name, count in zip(dataset.classes, counts, strict=True))
        if len(counts) > _MAX_CLASSES_SHOWN:
            of = [f"{counts[label]:,} ({dataset.classes[label]})" for label in (int(counts.argmin()), most)]
            each = f"{of[0]} to {of[1]} a class"
        say(f"{split}: {len(images):,} images in {len(counts):,} classes: {each}")
        if split == "train" and counts[most] >= _UNEQUAL * counts[fewest]:
            names = f"{dataset.classes[most]} has {counts[most]:,} images, {dataset.classes[fewest]} {counts[fewest]:,}"
            say(f"note: very unequal classes: {names}; `class_weights: balanced` in a stage weighs them alike")
        if absent := [dataset.classes[label] for label in np.flatnonzero(counts == 0)]:
            say(f"note: {split}: no images of {len(absent):,} classes: {listed(absent)}")
