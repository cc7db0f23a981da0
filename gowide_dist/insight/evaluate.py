"""Accuracies, confusion and calibration of a finished network on a dataset."""

from __future__ import annotations

import csv
import heapq
import io
import json
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gowide_dist import files
from gowide_dist.insight import text
from gowide_dist.insight.trained import Classifier, Trained, predict
from gowide_dist.train.losses import accuracy

NUM_BINS = 15
MANY_CLASSES = 20  # with more, only the worst are printed
WORST_SHOWN = 10


@dataclass(frozen=True)
class Evaluation:
    """Accuracies and expected calibration error (`ece`) in %; nll: mean negative log-likelihood of labels.

    confusion: images by label (rows) and prediction (columns), [K, K]. per_class_top1: None for a class without images.
    top1_in_training: top-1 in done.json if that is of the same images, else None.
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

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def evaluate(trained: Trained, path: Path | None = None) -> Evaluation:
    """Evaluate a network once on every image of an FFCV file, without autocast, on a GPU if there is one.

    path: by default the run's own validation images. Raises DataError if the file does not fit the network.
    """
    path = path or trained.recipe.data.val
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_classes = len(trained.info.classes)
    with closing(trained.validation_images(path)) as images:
        images.preflight(num_classes)
        classifier = Classifier(trained.network(), trained.info).to(device).to(memory_format=torch.channels_last)
        name = f"{trained.instance.key} on {path}"
        logits, labels = predict(lambda batch: classifier(batch.to(device)), images, name)
    hits = {name: 100 * float(values.double().mean()) for name, values in accuracy(logits, labels).items()}
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    confusion.index_put_((labels, logits.argmax(dim=1)), torch.tensor(1), accumulate=True)
    counts = confusion.sum(dim=1).tolist()
    return Evaluation(
        run=str(trained.run.path),
        stage=trained.instance.stage_name,
        network=trained.instance.network_name,
        data=str(path),
        images=len(labels),
        top1=hits["top1"],
        top5=hits["top5"],
        nll=float(F.cross_entropy(logits.double(), labels)),
        ece=calibration_error(logits, labels),
        top1_in_training=trained.done.top1 if trained.is_own_validation(path) else None,
        classes=trained.info.classes,
        per_class_images=counts,
        per_class_top1=[
            100 * hit / count if count else None
            for hit, count in zip(confusion.diagonal().tolist(), counts, strict=True)
        ],
        confusion=confusion.tolist(),
    )


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in % of logits [N, K] for labels [N] (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Images are sorted by confidence, the largest softmax probability, into 15 bins of equal width, ((m - 1) / 15,
    m / 15]; the error is the mean over the bins B_m, weighted by their images, of the distance between accuracy and
    mean confidence: sum_m |B_m| / N * |acc(B_m) - conf(B_m)|.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    bins = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    surplus = (predicted == labels).double() - confidence
    return 100 * float(torch.zeros(NUM_BINS).double().index_add(0, bins, surplus).abs().sum()) / len(labels)


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write `eval.json` and `confusion.csv`. Raises RunError if the folder cannot be written."""
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(["class", *evaluation.classes])
    writer.writerows([name, *row] for name, row in zip(evaluation.classes, evaluation.confusion, strict=True))
    with files.writing_to(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(folder / "confusion.csv", rows.getvalue())
        files.write_atomically(folder / "eval.json", evaluation.to_json() + "\n")


def table(evaluation: Evaluation) -> str:
    """The evaluation for the terminal: of many classes the worst, and the most frequent confusions."""
    e = evaluation
    in_training = "" if e.top1_in_training is None else f" ({e.top1_in_training:.2f} in training)"
    parts = [
        f"{e.run}  {e.stage}/{e.network} on {e.images:,} images of {e.data}\n"
        f"top-1 {e.top1:.2f} %{in_training}, top-5 {e.top5:.2f} %, negative log-likelihood {e.nll:.4f}, "
        f"calibration error {e.ece:.2f} % ({NUM_BINS} bins)"
    ]
    accuracies = {label: top1 for label, top1 in enumerate(e.per_class_top1) if top1 is not None}
    shown, title = list(accuracies), "class"
    if len(accuracies) > MANY_CLASSES:
        shown = sorted(accuracies, key=accuracies.__getitem__)[:WORST_SHOWN]
        title = f"worst of {len(accuracies)} classes"
    rows = [(e.classes[label], f"{e.per_class_images[label]:,}", f"{accuracies[label]:.2f}") for label in shown]
    parts.append(text.table((title, "images", "top-1 %"), rows))
    if confused := _most_confused(e.confusion):
        pairs = [
            (e.classes[label], e.classes[other], f"{count:,}", f"{100 * count / e.per_class_images[label]:.1f}")
            for label, other, count in confused
        ]
        parts.append(text.table(("most confused: class", "taken for", "images", "% of the class"), pairs, left=(0, 1)))
    return "\n\n".join(parts)


def _most_confused(confusion: list[list[int]]) -> list[tuple[int, int, int]]:
    """The most frequent mistakes: label, prediction, count."""
    mistakes = (
        (label, other, count)
        for label, row in enumerate(confusion)
        for other, count in enumerate(row)
        if count and label != other
    )
    return heapq.nlargest(WORST_SHOWN, mistakes, key=lambda mistake: mistake[2])
