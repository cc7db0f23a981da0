"""Exported files beside PyTorch: accuracy, agreement and latency of each in its runtimes, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gowide_dist.errors import InternalError
from gowide_dist.export.formats import FORMATS, Request, is_int8
from gowide_dist.export.process import BackendError, missing_packages, running
from gowide_dist.insight import text
from gowide_dist.insight.latency import latency_ms
from gowide_dist.insight.trained import Classifier, Images, Trained, predict
from gowide_dist.networks.quantised import unrounded
from gowide_dist.progress import say

LOGITS_TOLERANCE = 1e-4  # difference of a float32 file's logits from PyTorch's, relative to the largest if above 1
MAX_INT8_LOSS = 0.5  # points of top-1; with more the user is warned


class Comparison:
    """The network's own logits on all validation images, to compare those of its files with.

    A network that is trained to be rounded has two kinds: of float32, and as it is trained, for its files of 8 bits.
    pytorch, rounded: the network's own figures, as `runtimes` gives a file's.
    """

    def __init__(self, trained: Trained, request: Request, validation: Images) -> None:
        self._request, self._validation = request, validation
        self._image = [trained.recipe.data.resolution] * 2 + [3]
        network = trained.network()
        classifier = Classifier(unrounded(network), trained.preprocessing).eval()
        self._expected, self._labels = predict(classifier, validation, "validating PyTorch")
        self.num_images, self._num_classes = self._expected.shape
        with torch.inference_mode():
            noise = torch.randint(256, (request.batch or 1, *self._image), dtype=torch.uint8)
            latency = {str(len(noise)): round(latency_ms(classifier, noise), 3)}
        self.pytorch = {"latency_ms": latency, **self._figures(self._expected, self._expected)}
        self._expected_int8, self.rounded = self._expected, None
        if network is not classifier.network:
            classifier = Classifier(network, trained.preprocessing).eval()
            self._expected_int8, _ = predict(classifier, validation, "validating PyTorch, rounded to 8 bits")
            self.rounded = self._figures(self._expected_int8, self._expected_int8)

    def runtimes(self, name: str, folder: Path) -> dict[str, Any]:
        """The figures of a format's file in each of its runtimes, by name; `not_run` says why where there are none.

        Raises InternalError if a file's own runtime, the first, cannot run it, or gives other logits of a float32 file.
        Of others that is only said: OpenCV reads ONNX, but not all of it, and computes a MobileNetV3 wrongly.
        """
        form, python = FORMATS[name], self._request.python(name)
        figures: dict[str, Any] = {}
        for runtime in form.runtimes:
            file = form.files[0]
            if missing := missing_packages(python, runtime.packages):
                figures[runtime.name] = {"not_run": f"{', '.join(missing)} is missing"}
                continue
            job = {
                "run": runtime.name,
                "file": str(folder / file),
                "threads": torch.get_num_threads(),
                "batch": self._request.batch_of(name),
                "image": self._image,
                "packages": runtime.packages,
            }
            try:
                with running(python, job, self._num_classes) as (answer, forward):
                    logits, _ = predict(forward, self._validation, f"validating {file} in {runtime.name}")
            except BackendError as error:
                if runtime == form.runtimes[0]:
                    raise InternalError(
                        f"{file}: {runtime.name} does not run it: {error}; nothing was written"
                    ) from error
                figures[runtime.name] = {"not_run": str(error)}
                continue
            expected = self._expected_int8 if is_int8(name) else self._expected
            figures[runtime.name] = {**answer, **self._figures(logits, expected)}
            if not is_int8(name) and (fault := self._fault(figures[runtime.name]["largest_logit_difference"])):
                if runtime == form.runtimes[0]:
                    raise InternalError(f"{file} in {runtime.name}: {fault}; nothing was written")
                say(f"warning: {file} in {runtime.name}: {fault}; the file is right, take another runtime")
        return figures

    def _figures(self, logits: Tensor, expected: Tensor) -> dict[str, Any]:
        best, has_labels = logits.argmax(dim=1), bool((self._labels >= 0).all())
        return {
            "top1": 100 * float((best == self._labels).double().mean()) if has_labels else None,
            "top1_agreement": 100 * float((best == expected.argmax(dim=1)).double().mean()),
            "largest_logit_difference": float((logits - expected).abs().max()),
        }

    def _fault(self, difference: float) -> str:
        """What is wrong with float32 logits that differ from PyTorch's by so much; nothing if that is rounding."""
        allowed = LOGITS_TOLERANCE * max(1.0, float(self._expected.abs().max()))
        if difference <= allowed:  # not if it is NaN
            return ""
        images = f"{self.num_images:,} validation images"
        return f"logits differ by up to {difference:.2g} from PyTorch's on {images}, {allowed:.2g} is allowed"

    def warn_of_losses(self, formats: Mapping[str, Any]) -> None:
        """Say which files of 8 bits lose more accuracy than they should, and what helps."""
        helps = "take the float32 file" + ("" if self.rounded else ", or train `quantised: true` (docs/export.md)")
        own = (self.rounded or self.pytorch)["top1"]
        for name, form in formats.items():
            for runtime, figures in form["runtimes"].items() if is_int8(name) else ():
                top1 = figures.get("top1")
                if own is not None and top1 is not None and own - top1 > MAX_INT8_LOSS:
                    file = FORMATS[name].files[0]
                    say(f"warning: {file} in {runtime} loses {own - top1:.2f} points of top-1; {helps}")


def table(report: Mapping[str, Any]) -> str:
    """The content of `export.json` for the terminal."""
    batch = next(iter(report["pytorch"]["latency_ms"]))
    columns = {
        "MB": ("megabytes", ".2f"),
        "top-1 %": ("top1", ".2f"),
        "as PyTorch %": ("top1_agreement", ".2f"),
        "logits differ by": ("largest_logit_difference", ".1e"),
        f"ms, batch {batch}": ("latency", ",.2f"),
    }
    rows, notes = [], []
    runs = [("(PyTorch, eager)", "", report["pytorch"])]
    if report["rounded"]:
        runs.append(("(PyTorch, rounded to 8 bits)", "", report["rounded"]))
    for form in report["formats"].values():
        file = next(iter(form["files"]))
        size = {"megabytes": sum(each["bytes"] for each in form["files"].values()) / 1e6}
        runs += [(file, runtime, size | figures) for runtime, figures in form["runtimes"].items()] or [(file, "", size)]
    for file, runtime, figures in runs:
        row = figures | {"latency": figures.get("latency_ms", {}).get(batch)}
        cells = ("" if row.get(key) is None else format(row[key], spec) for key, spec in columns.values())
        rows.append([file, runtime, *cells])
        if reason := figures.get("not_run"):
            notes.append(f"{file} not run in {runtime}: {reason}")
    validation, cpu = report["validation"], f"{report['cpu']}, threads: {report['asked']['threads']}"
    notes.append(f"compared on {validation['images']:,} images of {validation['data']}; latency: medians, {cpu}")
    return f"{text.table(['file', 'runtime', *columns], rows, left=(0, 1))}\n\n" + "\n".join(notes)
