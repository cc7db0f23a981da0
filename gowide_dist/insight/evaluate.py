"""Accuracies, confusion and calibration of a finished network on a dataset."""

from __future__ import annotations

import csv
import heapq
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gowide_dist.data.folder import FolderImages
from gowide_dist.data.info import check_split
from gowide_dist.data.loader import Loader
from gowide_dist.files import write_atomically, writing_to
from gowide_dist.insight import text
from gowide_dist.insight.trained import Classifier, Trained, predict
from gowide_dist.progress import say
from gowide_dist.run import top5_is_telling
from gowide_dist.train.context import configure_backends
from gowide_dist.train.losses import accuracy

NUM_BINS = 15
MANY_CLASSES = 20  # with more, only the worst are printed
WORST_SHOWN = 10


def evaluate(
    trained: Trained, path: Path | None = None, *, folder: Path | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Evaluate a network once on every image, without autocast, on a GPU if there is one.

    path: an FFCV file, by default the run's own validation images; folder: of class folders, in its place. out: where
    to write what `write_evaluation` writes. Raises DataError if the images do not fit the network.

    Returns the content of `eval.json`: accuracies and the expected calibration error (`ece`) in %, the mean negative
    log-likelihood of the labels (`nll`), `confusion` [K, K], images by label (rows) and prediction (columns), and
    `per_class_top1`, None without images, with their mean `balanced_top1`; `top1_in_training`: the top-1 in done.json
    if that is of the same images.
    """
    path = path or trained.recipe.data.val
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configure_backends(trained.recipe, trained.instance.stage)
    classes, num_classes = trained.preprocessing.classes, len(trained.preprocessing.classes)
    with closing(trained.folder_images(folder) if folder else trained.validation_images(path)) as images:
        if out:
            with writing_to(out, "--out"):
                out.mkdir(parents=True, exist_ok=True)
        if isinstance(images, Loader):
            images.preflight(num_classes)
            if check_split(path).checksum == trained.train_checksum:
                say(f"note: {path}: the images that {trained.instance.key} was trained on; others tell how good it is")
        classifier = Classifier(trained.network(), trained.preprocessing)
        classifier = classifier.to(device).to(memory_format=torch.channels_last)
        logits, labels = predict(lambda batch: classifier(batch.to(device)), images, trained.instance.key)
    top1_and_top5 = {name: 100 * float(hits.double().mean()) for name, hits in accuracy(logits, labels).items()}
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    confusion.index_put_((labels, logits.argmax(dim=1)), torch.tensor(1), accumulate=True)
    counts = confusion.sum(dim=1).tolist()
    hits_and_counts = zip(confusion.diagonal().tolist(), counts, strict=True)
    per_class = [100 * hit / count if count else None for hit, count in hits_and_counts]
    evaluation = {
        "run": str(trained.run.path),
        "stage": trained.instance.stage_name,
        "network": trained.instance.network_name,
        "data": str(folder or path),
        "images": len(labels),
        **top1_and_top5,
        "balanced_top1": fmean(top1 for top1 in per_class if top1 is not None),
        "nll": float(F.cross_entropy(logits.double(), labels)),
        "ece": calibration_error(logits, labels),
        "top1_in_training": trained.done.top1
        if not folder and check_split(path).checksum == trained.val_checksum
        else None,
        "classes": classes,
        "per_class_images": counts,
        "per_class_top1": per_class,
        "confusion": confusion.tolist(),
    }
    if out:
        names = images.names if isinstance(images, FolderImages) else list(map(str, range(len(labels))))
        write_evaluation(evaluation, names, logits, labels, out)
    return evaluation


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in % of logits [N, K] for labels [N] (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Images fall into 15 bins of equal width, ((m - 1) / 15, m / 15], by their confidence, the largest softmax
    probability: sum_m |B_m| / N * |accuracy(B_m) - mean confidence(B_m)|.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    bins = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    surplus = (predicted == labels).double() - confidence
    return 100 * float(torch.zeros(NUM_BINS).double().index_add(0, bins, surplus).abs().sum()) / len(labels)


def write_evaluation(
    evaluation: Mapping[str, Any], names: Sequence[str], logits: Tensor, labels: Tensor, folder: Path
) -> None:
    """Write `eval.json`, `confusion.csv`, `predictions.csv` and `logits.npy` (float32 [N, K], in the rows' order).

    folder: exists. names: of the images. Raises RunError if the folder cannot be written.
    """
    classes = evaluation["classes"]
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    images = zip(names, labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
    array = io.BytesIO()
    np.save(array, logits.numpy())
    with writing_to(folder, "--out"):
        rows = zip(classes, evaluation["confusion"], strict=True)
        write_atomically(folder / "confusion.csv", _csv(["class", *classes], ([name, *row] for name, row in rows)))
        predictions = ((name, classes[label], classes[best], f"{part:.6f}") for name, label, best, part in images)
        write_atomically(folder / "predictions.csv", _csv(["image", "class", "predicted", "confidence"], predictions))
        write_atomically(folder / "logits.npy", array.getvalue())
        write_atomically(folder / "eval.json", json.dumps(evaluation, indent=2) + "\n")


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    return text.getvalue()


def table(evaluation: Mapping[str, Any]) -> str:
    """The evaluation for the terminal: of many classes the worst, and the most frequent confusions."""
    e, names, images = evaluation, evaluation["classes"], evaluation["per_class_images"]
    in_training = "" if e["top1_in_training"] is None else f" ({e['top1_in_training']:.2f} in training)"
    top5 = f"top-5 {e['top5']:.2f} %, " if top5_is_telling(len(names)) else ""
    head = (
        f"{e['run']}  {e['stage']}/{e['network']} on {e['images']:,} images of {e['data']}\n"
        f"top-1 {e['top1']:.2f} %{in_training}, its mean over classes {e['balanced_top1']:.2f} %, "
        f"{top5}negative log-likelihood {e['nll']:.4f}, calibration error {e['ece']:.2f} % "
        f"({NUM_BINS} bins)"
    )
    classes, title = [row for row in zip(names, images, e["per_class_top1"], strict=True) if row[1]], "class"
    if len(classes) > MANY_CLASSES:
        title = f"worst of {len(classes)} classes"
        classes = sorted(classes, key=itemgetter(2))[:WORST_SHOWN]
    accuracies = [(name, f"{count:,}", f"{top1:.2f}") for name, count, top1 in classes]
    mistakes = ((n, i, j) for i, row in enumerate(e["confusion"]) for j, n in enumerate(row) if n and i != j)
    confused = [
        (names[i], names[j], f"{n:,}", f"{100 * n / images[i]:.1f}")
        for n, i, j in heapq.nlargest(WORST_SHOWN, mistakes)
    ]
    tables = [text.table((title, "images", "top-1 %"), accuracies)]
    if confused:
        tables.append(
            text.table(("most confused: class", "taken for", "images", "% of the class"), confused, left=(0, 1))
        )
    return "\n\n".join([head, *tables])
