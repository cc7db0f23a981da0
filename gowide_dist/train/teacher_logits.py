"""A teacher's logits for a whole stream of images, stored once, so that its students never run it.

Every augmentation is a function of (seed, epoch, sample), so the teacher's answers are known before a student trains.
They lie in one safetensors file beside the runs, `runs/teacher_logits/<hash>.safetensors`, named after all that they
depend on; every stage of every run in that folder that needs the same answers uses the same file.

Shapes: B images, K classes, k of them kept. A row is an image at its place in the stream: `values` and `classes` have
one for each training image, step after step, `val_values` and `val_classes` for each validation image. For ImageNet, 50
epochs of 1.28 million images with the 10 best classes take 2.7 GB (42 bytes a row), with all 1,000 classes 128 GB.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gowide_dist.data.order import validation_part
from gowide_dist.errors import RunError
from gowide_dist.files import try_lock
from gowide_dist.identity import fingerprint
from gowide_dist.progress import Track
from gowide_dist.stop import Stopped
from gowide_dist.world import World, to_device

_HEADER_BYTES = 8192  # the checksum is filled in when all is there
_WAIT_S = 1.0
_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "I16": np.dtype("<i2"), "I32": np.dtype("<i4")}


class TeacherOutput(NamedTuple):
    """What the teacher said of a batch: `values` [B, K], or [B, k + 1] as `coarsened` for `classes` [B, k]."""

    values: Tensor
    classes: Tensor | None = None

    def chunk(self, parts: int) -> list[TeacherOutput]:
        """The answers in equal parts."""
        classes = [None] * parts if self.classes is None else self.classes.chunk(parts)
        return [TeacherOutput(*part) for part in zip(self.values.chunk(parts), classes, strict=True)]

    def to(self, device: torch.device) -> TeacherOutput:
        """The answers on a device."""
        classes = None if self.classes is None else to_device(self.classes, device)
        return TeacherOutput(to_device(self.values, device), classes)


def coarsened(logits: Tensor, classes: Tensor | None, temperature: float) -> Tensor:
    """Logits of the named classes and one for all the others together: [B, K], classes [B, k] -> [B, k + 1].

    The others' logit is T log(sum of exp(z / T)), so that at temperature T softmax gives the others the mass that they
    have among all K classes. The KL divergence of two distributions that were coarsened alike is what theirs over K
    classes is, less the others' mass times the divergence within them: never more, and exact for the mass. Spreading
    the mass evenly over the others instead would teach the student an evenness that the teacher never had.
    """
    if classes is None:
        return logits.float()
    logits, classes = logits.float(), classes.long()
    others = logits.scatter(1, classes, -math.inf)
    rest = temperature * torch.logsumexp(others / temperature, dim=1, keepdim=True)
    return torch.cat([logits.gather(1, classes), rest], dim=1)


def answers(logits: Tensor, top_k: int | None, temperature: float) -> TeacherOutput:
    """What is stored of logits [B, K], in half precision.

    Each row is shifted so that its best logit is 0, which no softmax sees: halves are finest near 0, so that the
    likely classes are the most exact.
    """
    logits = logits.float()
    logits = logits - logits.amax(dim=1, keepdim=True)
    classes = logits.topk(top_k, dim=1).indices if top_k else None
    return TeacherOutput(coarsened(logits, classes, temperature).half(), None if classes is None else classes.int())


@dataclass(frozen=True)
class Layout:
    """What a file has room for. rows_per_epoch: training images of an epoch, without an incomplete last batch."""

    epochs: int
    rows_per_epoch: int
    val_rows: int
    num_classes: int
    top_k: int | None
    temperature: float

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """Names, safetensors types and shapes, in the order of the file."""
        found: dict[str, tuple[str, tuple[int, int]]] = {}
        for prefix, rows in (("", self.epochs * self.rows_per_epoch), ("val_", self.val_rows)):
            found[f"{prefix}values"] = "F16", (rows, self.top_k + 1 if self.top_k else self.num_classes)
            if self.top_k:
                found[f"{prefix}classes"] = "I16" if self.num_classes <= 2**15 else "I32", (rows, self.top_k)
        return found

    @property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Where each tensor begins and ends, in bytes behind the header."""
        found, end = {}, 0
        for name, (dtype, shape) in self.tensors.items():
            begin, end = end, end + math.prod(shape) * _DTYPES[dtype].itemsize
            found[name] = begin, end
        return found

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return _HEADER_BYTES + max(end for _, end in self.offsets.values())


@dataclass(frozen=True)
class Source:
    """How to ask the teacher: its logits [b, K] for this process's batches of an epoch, and of the validation set."""

    train: Callable[[int], Iterator[Tensor]]
    val: Callable[[], Iterator[Tensor]]


class TeacherLogits:
    """A whole file, open for reading."""

    def __init__(self, path: Path) -> None:
        file: Any = safe_open(path, "pt")
        self._tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- no mapping

    def train(self, start: int, count: int) -> TeacherOutput:
        """The answers to `count` training images from place `start` of the stream on."""
        return self._rows("", start, count)

    def val(self, start: int, count: int) -> TeacherOutput:
        """The answers to `count` validation images from sample `start` on."""
        return self._rows("val_", start, count)

    def _rows(self, prefix: str, start: int, count: int) -> TeacherOutput:
        values, classes = self._tensors[f"{prefix}values"], self._tensors.get(f"{prefix}classes")
        rows = slice(start, start + count)
        return TeacherOutput(values[rows], classes[rows] if classes else None)


def stored_logits(
    folder: Path, about: Mapping[str, Any], layout: Layout, source: Source, world: World, name: str
) -> TeacherLogits:
    """The file of the answers that `about` describes, stored first if nobody has done so; a collective.

    Killed or told to stop, it continues with the epoch that it was in. If another job is storing the same, it waits.
    Raises RunError if the file is damaged, Stopped if told to stop.
    """
    path = folder / f"{fingerprint(about)[:16]}.safetensors"
    waits = False
    while not _exists(path, world):
        with _only_writer(path, world) as mine:
            if mine and not _exists(path, world):
                _store(path, about, layout, source, world, name)
        if not mine:
            if world.is_main and not waits:
                Track(name, 0, "").line(f"{name}  waits for {path}, which another job is writing")
            waits = True
            if signum := world.vote().signum:
                raise Stopped(signum)
            time.sleep(_WAIT_S)
    if world.is_main:
        verify(path)
    world.broadcast(None)  # nobody reads what is not verified
    return TeacherLogits(path)


def verify(path: Path) -> None:
    """Raises RunError unless the file is whole."""
    try:
        with safe_open(path, "np") as opened:
            expected = opened.metadata()["sha256"]
        if _checksum(path) == expected:
            return
    except (SafetensorError, KeyError, OSError):
        pass
    raise RunError(f"{path}: damaged; delete it, and the same command asks the teacher again")


def _store(path: Path, about: Mapping[str, Any], layout: Layout, source: Source, world: World, name: str) -> None:
    """Ask the teacher about every image of the stream: all processes ask, the main process writes."""
    partial = _Partial(path, about, layout) if world.is_main else None
    first = world.broadcast(partial.epochs if partial else 0)
    steps = layout.epochs * layout.rows_per_epoch
    progress = Track(
        f"{name} asks the teacher", steps, "images", start=first * layout.rows_per_epoch, quiet=not partial
    )
    with progress:
        for epoch in range(first, layout.epochs):
            row = epoch * layout.rows_per_epoch
            for logits in source.train(epoch):
                values, classes = answers(logits, layout.top_k, layout.temperature)
                values, classes = world.gather(values), None if classes is None else world.gather(classes)
                if partial:
                    partial.write("", row, TeacherOutput(values, classes))
                row += len(values)
                progress.update(row)
                if signum := world.vote().signum:
                    progress.line(f"{name}  has the teacher's logits of {epoch} epochs: told to stop")
                    raise Stopped(signum)
            if partial:
                partial.complete(epoch + 1)
        _store_validation(partial, layout, source, world)
    if partial:
        partial.finish()
        progress.line(f"{name}  stored the teacher's logits: {path}, {layout.num_bytes / 1e6:,.1f} MB")


def _store_validation(partial: _Partial | None, layout: Layout, source: Source, world: World) -> None:
    """As for training; shares differ by one image at most, and are filled up for the way to the main process."""
    mine = [answers(logits, layout.top_k, layout.temperature) for logits in source.val()]
    longest = -(-layout.val_rows // world.size)
    for name, parts in (("val_values", [part.values for part in mine]), ("val_classes", [p.classes for p in mine])):
        if name in layout.tensors:
            rows = torch.cat([part for part in parts if part is not None])
            filled = rows.new_zeros(longest, rows.shape[1])
            filled[: len(rows)] = rows
            gathered = world.gather(filled)
            if partial:
                for rank in range(world.size):
                    share = validation_part(layout.val_rows, rank, world.size)
                    partial.write_rows(name, int(share[0]), gathered[rank * longest :][: len(share)])


class _Partial:
    """The file while it grows, `.<name>.partial`. `epochs`: how many of them are safely on the disk."""

    def __init__(self, path: Path, about: Mapping[str, Any], layout: Layout) -> None:
        self._path, self._about, self._layout = path, about, layout
        self._partial = path.with_name(f".{path.name}.partial")
        self.epochs = self._epochs_there()
        self._file = self._partial.open("r+b" if self.epochs else "w+b")
        if not self.epochs:
            os.posix_fallocate(self._file.fileno(), 0, layout.num_bytes)  # a full disk shows now, not in an hour
            self.complete(0)

    def _epochs_there(self) -> int:
        try:
            with safe_open(self._partial, "np") as opened:
                return int(opened.metadata()["epochs"])
        except (SafetensorError, KeyError, ValueError, OSError):
            return 0

    def write(self, prefix: str, row: int, what: TeacherOutput) -> None:
        self.write_rows(f"{prefix}values", row, what.values)
        if what.classes is not None:
            self.write_rows(f"{prefix}classes", row, what.classes)

    def write_rows(self, name: str, row: int, values: Tensor) -> None:
        dtype = _DTYPES[self._layout.tensors[name][0]]
        self._file.seek(_HEADER_BYTES + self._layout.offsets[name][0] + row * values.shape[1] * dtype.itemsize)
        self._file.write(values.cpu().numpy().astype(dtype).tobytes())

    def complete(self, epochs: int, checksum: str = "") -> None:
        """Put what was written on the disk, and only then say so in the header."""
        self._sync()
        tensors = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": self._layout.offsets[name]}
            for name, (dtype, shape) in self._layout.tensors.items()
        }
        metadata = {"about": json.dumps(self._about, sort_keys=True), "epochs": str(epochs), "sha256": checksum}
        header = json.dumps({"__metadata__": metadata, **tensors}).encode()
        assert len(header) <= _HEADER_BYTES - 8
        self._file.seek(0)
        self._file.write(struct.pack("<Q", _HEADER_BYTES - 8) + header.ljust(_HEADER_BYTES - 8))
        self._sync()

    def finish(self) -> None:
        self._sync()
        self.complete(self._layout.epochs, _checksum(self._partial))
        self._file.close()
        self._partial.replace(self._path)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(_HEADER_BYTES)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exists(path: Path, world: World) -> bool:
    return world.broadcast(world.is_main and path.exists())


@contextmanager
def _only_writer(path: Path, world: World) -> Iterator[bool]:
    """Whether this job is the one that may write the file; a collective."""
    if not world.is_main:
        yield world.broadcast(False)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with try_lock(path.with_suffix(".lock")) as mine:
        yield world.broadcast(mine)
