"""Writes the files of a finished network: the torch.export program here, what is made of it in other processes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.export import ExportedProgram

from gowide_dist.errors import InternalError
from gowide_dist.export.counterparts import in_timm, timm_config, timm_weights
from gowide_dist.export.formats import FORMATS, Request, is_int8
from gowide_dist.export.process import BackendError, convert
from gowide_dist.insight.trained import Classifier, Trained
from gowide_dist.networks.folding import fold_batch_norms
from gowide_dist.networks.foreign import Foreign
from gowide_dist.networks.quantised import Range, exported, operations, rounded_nodes, unrounded

CALIBRATION_IMAGES = 512
_CALIBRATION = "calibration.npy"
_NAMES = "names.json"


class FormatWriter:
    """Writes formats into a folder, each after the one that it is made of. train: the training images that calibrate.

    `calibration` says which images did, once a format of 8 bits is written.
    """

    def __init__(self, folder: Path, trained: Trained, request: Request, train: Path | None) -> None:
        self._folder, self._trained, self._request, self._train = folder, trained, request, train
        self.calibration: dict[str, Any] | None = None
        self._ranges: dict[str, Range] = {}  # of activations, by the nodes of the program that give them

    def write(self, name: str) -> None:
        """Write the files of a format. Raises InternalError if the network cannot be converted."""
        path = self._folder / FORMATS[name].files[0]
        match name:
            case "safetensors":
                trained = self._trained
                shutil.copyfile(trained.run.stage(trained.instance.key).model, path)
            case "timm":
                self._write_timm(path)
            case "pt2" | "pt2-fixed":
                self._write_program(path, self._request.batch_of(name))
            case _:
                self._convert(name, path)

    def remove_all_but(self, names: Collection[str]) -> None:
        """Remove what was written on the way to the formats `names`."""
        kept = {file for name in names for file in FORMATS[name].files}
        for file in {_CALIBRATION, _NAMES, *(file for form in FORMATS.values() for file in form.files)} - kept:
            (self._folder / file).unlink(missing_ok=True)

    def _write_timm(self, config: Path) -> None:
        counterpart = in_timm(self._trained.instance.architecture)
        assert counterpart is not None, "is checked before"
        config.parent.mkdir()
        config.write_text(json.dumps(timm_config(counterpart, self._trained.preprocessing), indent=2) + "\n")
        weights = timm_weights(counterpart, self._trained.network().plain.state_dict())
        save_file(weights, config.with_name("model.safetensors"), {"format": "pt"})

    def _write_program(self, path: Path, batch: int | None) -> None:
        """The graph of the classifier, batch norms folded, for `batch` images, or for any number."""
        trained = self._trained
        classifier = Classifier(fold_batch_norms(unrounded(trained.network())), trained.preprocessing).eval()
        program = _program(classifier, trained.recipe.data.resolution, batch)
        if rounding := trained.preprocessing.quantisation:
            names = (node.name for node in rounded_nodes(operations(program).graph))
            self._ranges = dict(zip(names, rounding.ranges, strict=True))
        content = io.BytesIO()  # PyTorch's own writing of a file aborts the process on a full disk
        torch.export.save(program, content)
        path.write_bytes(content.getbuffer())

    def _convert(self, name: str, path: Path) -> None:
        source = FORMATS[name].source
        assert source is not None
        side = self._trained.recipe.data.resolution
        job = {
            "convert": name,
            "source": str(self._folder / FORMATS[source].files[0]),
            "target": str(path),
            "image": [side, side, 3],
            "batch": self._request.batch_of(name),
            "opset": self._request.opset,
            "symmetric": self._request.symmetric,
            "calibration": self._calibration_images() if is_int8(name) else None,
            "names": str(self._folder / _NAMES),
            "ranges": self._ranges,
        }
        try:
            convert(self._request.python(name), job)
        except BackendError as error:
            network = self._trained.instance.network_name
            raise InternalError(f"{path.name}: cannot be made of {network}: {error}; nothing was written") from error

    def _calibration_images(self) -> str:
        """A file of training images, uint8 [N, H, H, 3]: as many of each class."""
        path = self._folder / _CALIBRATION
        if not self.calibration:
            assert self._train is not None
            with contextlib.closing(self._trained.training_images(self._train, CALIBRATION_IMAGES)) as loader:
                images = np.concatenate([batch.images.numpy().copy() for batch in loader.batches()])
            np.save(path, images)
            self.calibration = {"data": str(self._train), "images": len(images)}
        return str(path)


def _program(classifier: Classifier, resolution: int, batch: int | None) -> ExportedProgram:
    """The graph of a classifier for `batch` images; None: for any number."""
    # for any number of images an example of more than one, which would become a constant
    example = torch.zeros(batch or 2, resolution, resolution, 3, dtype=torch.uint8)
    try:
        program = exported(classifier, example, batch)
    except Exception as error:
        settings: object = classifier.network.architecture
        if isinstance(settings, Foreign):  # whose code may do what no graph can say
            raise InternalError(f"{settings}: torch.export: {' '.join(str(error).split())[:200]}") from error
        raise
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of this machine
    return program
