"""How good a finished network is on images: accuracies, confusion, and how far its confidence is to be trusted."""

from __future__ import annotations

import csv
import io
import json
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor

from gowide_dist.errors import RunError, is_full
from gowide_dist.files import write_atomically
from gowide_dist.insight.text import rendered
from gowide_dist.insight.trained import Classifier, Trained
from gowide_dist.progress import Track
from gowide_dist.train.losses import accuracy

NUM_BINS = 15
MANY_CLASSES = 20  # from which on only the worst of them are printed
WORST_SHOWN = 10


@dataclass(frozen=True)
class Evaluation:
    """Accuracies and ece in %.

    nll: negative log-likelihood of the labels, the mean over images of -log p(label). ece: see Tally. per_class_top1:
    of the images of each class, nothing for a class without any. confusion [K, K]: images by class (rows) and by what
    the network took them for (columns). top1_in_training: what done.json says, where these are the same images.
    """

    run: str
    stage: str
    network: str
    data: str
    images: int
    top1: float
    top5: float
    nll: float
    ece: float
    top1_in_training: float | None
    classes: tuple[str, ...]
    per_class_images: list[int]
    per_class_top1: list[float | None]
    confusion: list[list[int]]


class Tally:
    """Counts over all images of a dataset, K classes.

    The expected calibration error sorts images by confidence, the largest softmax probability, into 15 bins of equal
    width, ((m - 1) / 15, m / 15], and is the mean over the bins B_m, weighted by their images, of the distance between
    accuracy and mean confidence: sum_m |B_m| / n * |acc(B_m) - conf(B_m)| (Guo et al. 2017, arXiv 1706.04599, eq. 3).
    """

    def __init__(self, num_classes: int) -> None:
        self.images = 0
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # label, prediction
        self._sums = torch.zeros(3, dtype=torch.float64)  # hits, hits among five, negative log-likelihood
        self._bins = torch.zeros(2, NUM_BINS, dtype=torch.float64)  # sums of hits and of confidence

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, K], labels [B], on the CPU."""
        hits = accuracy(logits, labels)
        probabilities = logits.double().softmax(dim=1)
        nll = F.cross_entropy(logits.double(), labels, reduction="sum")
        self._sums += torch.stack([hits["top1"].double().sum(), hits["top5"].double().sum(), nll])
        confidence, predicted = probabilities.max(dim=1)
        bins = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
        self._bins[0].index_add_(0, bins, hits["top1"].double())
        self._bins[1].index_add_(0, bins, confidence)
        num_classes = len(self.confusion)
        self.confusion += torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view_as(
            self.confusion
        )
        self.images += len(labels)

    @property
    def top1(self) -> float:
        """In %."""
        return 100 * float(self._sums[0]) / self.images

    @property
    def top5(self) -> float:
        """In %."""
        return 100 * float(self._sums[1]) / self.images

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the labels."""
        return float(self._sums[2]) / self.images

    @property
    def ece(self) -> float:
        """Expected calibration error in %; see the class."""
        return 100 * float((self._bins[0] - self._bins[1]).abs().sum()) / self.images


def evaluate(trained: Trained, path: Path | None = None) -> Evaluation:
    """Run every image of an FFCV file through a network once, in float32, on a GPU if there is one.

    path: by default the run's own validation images. Raises DataError if they do not fit the network.
    """
    path = path or trained.recipe.data.val
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tally = Tally(len(trained.info.classes))
    with closing(trained.validation_images(path)) as images:
        images.preflight(len(trained.info.classes))
        classifier = Classifier(trained.network(), trained.info).to(device).to(memory_format=torch.channels_last)
        name = f"{trained.instance.key} on {path}"
        with torch.inference_mode(), Track(name, images.num_samples, "images", stderr=True) as shown:
            for batch in images.batches():
                tally.add(classifier(batch.images.to(device)).cpu(), batch.labels)
                shown.update(tally.images)
    counts = tally.confusion.sum(dim=1).tolist()
    return Evaluation(
        run=str(trained.run.path),
        stage=trained.instance.stage_name,
        network=trained.instance.network_name,
        data=str(path),
        images=tally.images,
        top1=tally.top1,
        top5=tally.top5,
        nll=tally.nll,
        ece=tally.ece,
        top1_in_training=trained.done.top1 if trained.is_own(path) else None,
        classes=trained.info.classes,
        per_class_images=counts,
        per_class_top1=[
            100 * hits / count if count else None
            for hits, count in zip(tally.confusion.diagonal().tolist(), counts, strict=True)
        ],
        confusion=tally.confusion.tolist(),
    )


def as_json(found: Evaluation) -> dict[str, Any]:
    """The evaluation as data."""
    return asdict(found)


def write_evaluation(found: Evaluation, folder: Path) -> None:
    """Write `eval.json` and `confusion.csv`. Raises RunError if the folder cannot be written."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["class", *found.classes])
    writer.writerows([name, *row] for name, row in zip(found.classes, found.confusion, strict=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "confusion.csv", text.getvalue())
        write_atomically(folder / "eval.json", json.dumps(as_json(found), indent=2) + "\n")
    except OSError as error:
        if is_full(error):
            raise
        raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another place with --out") from error


def table(found: Evaluation) -> str:
    """The evaluation for the terminal."""
    before = found.top1_in_training
    recorded = "" if before is None else f" ({before:.2f} when it was trained)"
    head = (
        f"{found.run}  {found.stage}/{found.network} on {found.images:,} images of {found.data}\n"
        f"top-1 {found.top1:.2f} %{recorded}, top-5 {found.top5:.2f} %, negative log-likelihood {found.nll:.4f}, "
        f"calibration error {found.ece:.2f} % ({NUM_BINS} bins)"
    )
    labels = [label for label, count in enumerate(found.per_class_images) if count]
    shown = labels
    if len(labels) > MANY_CLASSES:
        shown = sorted(labels, key=lambda label: found.per_class_top1[label] or 0.0)[:WORST_SHOWN]
    by_class = _table("class" if shown == labels else f"worst of {len(labels)} classes", "images", "top-1 %")
    for label in shown:
        by_class.add_row(
            found.classes[label], f"{found.per_class_images[label]:,}", f"{found.per_class_top1[label]:.2f}"
        )
    pairs = _table("most confused: images of", "taken for", "images", "of the class, %")
    for label, other, count in _most_confused(found.confusion):
        share = 100 * count / found.per_class_images[label]
        pairs.add_row(found.classes[label], found.classes[other], f"{count:,}", f"{share:.1f}")
    return f"{head}\n{rendered(by_class, pairs)}"


def _most_confused(confusion: list[list[int]]) -> list[tuple[int, int, int]]:
    """Label, prediction and count of the mistakes that are made most often."""
    mistakes = [
        (label, other, count)
        for label, row in enumerate(confusion)
        for other, count in enumerate(row)
        if count and label != other
    ]
    return sorted(mistakes, key=lambda mistake: -mistake[2])[:WORST_SHOWN]


def _table(*columns: str) -> Table:
    made = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        made.add_column(name, justify="right" if name == "images" or "%" in name else "left")
    return made
