"""A teacher's logits for a whole stream of images, stored once, so that its students never run it.

Every augmentation is a function of (seed, epoch, sample), so the teacher's outputs are known before a student trains.
They lie in `runs/teacher_logits/<hash of all that they depend on>/`, which every stage of every run there shares.

Shapes: B images, K classes, k of them kept. `values.npy` and `classes.npy` have a row for each training image, step
after step; `val_values.npy` and `val_classes.npy` for each validation image. They are written block after block: one
for each epoch, then the validation set. `logits.json`, rewritten after each block, has the SHA-256 of its rows. For
ImageNet, 50 epochs with the 10 best classes take 2.7 GB (42 bytes a row), with all 1,000 classes 128 GB.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gowide_dist.data.order import validation_part
from gowide_dist.errors import RunError
from gowide_dist.files import HashingFile, try_lock, write_atomically
from gowide_dist.identity import fingerprint
from gowide_dist.progress import Track
from gowide_dist.stop import Stopped
from gowide_dist.train.writing import Writer
from gowide_dist.world import World, to_device

DESCRIPTION = "logits.json"
WAIT_S = 1.0


class TeacherOutput(NamedTuple):
    """A teacher's output for a batch: logits `values` [B, K], or [B, k + 1] of `merge_tail` for `classes` [B, k]."""

    values: Tensor
    classes: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.values] if self.classes is None else [self.values, self.classes]

    def chunk(self, parts: int) -> list[TeacherOutput]:
        return [TeacherOutput(*part) for part in zip(*(rows.chunk(parts) for rows in self.tensors), strict=True)]

    def to(self, device: torch.device) -> TeacherOutput:
        return TeacherOutput(*(to_device(rows, device) for rows in self.tensors))


def merge_tail(logits: Tensor, classes: Tensor | None, temperature: float) -> Tensor:
    """Merge all classes but the given ones into one: logits [B, K], classes [B, k] -> [B, k + 1].

    The logit of the tail is T log(sum of exp(z / T)) over its classes, so that softmax at temperature T gives it the
    probability that they have together. The KL divergence of two distributions merged alike is that over K classes
    less the tail's probability times the divergence within the tail: never more, and exact for the probability.
    Spreading it evenly over the tail instead would teach the student an evenness that the teacher never had.
    """
    if classes is None:
        return logits.float()
    logits, classes = logits.float(), classes.long()
    tail = logits.scatter(1, classes, -math.inf)
    merged = temperature * torch.logsumexp(tail / temperature, dim=1, keepdim=True)
    return torch.cat([logits.gather(1, classes), merged], dim=1)


def compress(logits: Tensor, top_k: int | None, temperature: float) -> TeacherOutput:
    """What is stored of logits [B, K], in half precision: all classes, or the `top_k` best and the merged tail.

    Each row is shifted so that its best logit is 0, which softmax ignores: halves are finest near 0, so that the likely
    classes are the most exact.
    """
    logits = logits.float()
    logits = logits - logits.amax(dim=1, keepdim=True)
    classes = logits.topk(top_k, dim=1).indices if top_k else None
    return TeacherOutput(merge_tail(logits, classes, temperature).half(), None if classes is None else classes.int())


# The logits [b, K] of this process's batches of a block: of an epoch, or of its part of the validation set.
LogitsSource = Callable[[int], Iterable[Tensor]]
Metadata = Mapping[str, Any]  # all that the logits depend on


@dataclass(frozen=True)
class Layout:
    """What is stored: a block for each epoch, and block `epochs` for the validation set.

    rows_per_epoch: training images of an epoch, without an incomplete last batch.
    """

    epochs: int
    rows_per_epoch: int
    val_rows: int
    num_classes: int
    top_k: int | None
    temperature: float

    def block_rows(self, block: int) -> slice:
        if block == self.epochs:
            return slice(0, self.val_rows)
        return slice(block * self.rows_per_epoch, (block + 1) * self.rows_per_epoch)

    def arrays(self, block: int) -> list[tuple[str, np.dtype[Any], tuple[int, int]]]:
        """Names, types and shapes of the arrays with the rows of a block."""
        prefix, rows = ("val_", self.val_rows) if block == self.epochs else ("", self.epochs * self.rows_per_epoch)
        integer = "<i2" if self.num_classes <= 2**15 else "<i4"
        values = f"{prefix}values", np.dtype("<f2"), (rows, self.top_k + 1 if self.top_k else self.num_classes)
        return [values, (f"{prefix}classes", np.dtype(integer), (rows, self.top_k))] if self.top_k else [values]


class TeacherLogits:
    """Stored logits, mapped into memory. Each process verifies an epoch's block when it first reads from it.

    Raises RunError if the files are damaged.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout = folder, layout
        self._unverified = dict(enumerate(_read_digests(folder)))
        self._arrays: dict[str, np.memmap[Any, Any]] = {}
        for name, dtype, shape in [*layout.arrays(0), *layout.arrays(layout.epochs)]:
            try:
                self._arrays[name] = array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="r")
            except (OSError, ValueError) as error:
                raise _damaged(folder, name) from error
            if (array.dtype, array.shape) != (dtype, shape):
                raise _damaged(folder, name)
        self.val(0, 0)  # verified now: before an epoch is spent

    def train(self, start: int, count: int) -> TeacherOutput:
        """The output for `count` training images of one epoch, from row `start` of the stream on."""
        return self._rows(start // self._layout.rows_per_epoch, start, count)

    def val(self, start: int, count: int) -> TeacherOutput:
        """The output for `count` validation images, from sample `start` on."""
        return self._rows(self._layout.epochs, start, count)

    def _rows(self, block: int, start: int, count: int) -> TeacherOutput:
        for name, digest in self._unverified.pop(block, {}).items():
            if hashlib.sha256(self._arrays[name][self._layout.block_rows(block)].data).hexdigest() != digest:
                raise _damaged(self._folder, name)
        arrays = (self._arrays[name][start : start + count].copy() for name, _, _ in self._layout.arrays(block))
        return TeacherOutput(*map(torch.from_numpy, arrays))


def stored_logits(
    folder: Path, metadata: Metadata, layout: Layout, source: LogitsSource, world: World, name: str
) -> TeacherLogits:
    """The logits that `metadata` determines, stored first if nobody has done so; a collective.

    Killed or told to stop, it continues with the epoch that it was in. While another job stores the same, it waits.
    Raises RunError if the files are damaged or the disk is too small, Stopped if told to stop.
    """
    folder = folder / fingerprint(metadata)[:16]
    waits = False
    while not world.on_main(lambda: len(_read_digests(folder)) > layout.epochs):
        with ExitStack() as stack:
            if world.on_main(lambda: _lock(folder, stack)):
                _store(folder, metadata, layout, source, world, name)
                break
        if world.is_main and not waits:
            Track(name, 0, "").line(f"{name}  waits for {folder}, which another job is writing")
        waits = True
        if signum := world.vote().signum:
            raise Stopped(signum)
        time.sleep(WAIT_S)
    return TeacherLogits(folder, layout)


def _store(folder: Path, metadata: Metadata, layout: Layout, source: LogitsSource, world: World, name: str) -> None:
    """Run the teacher over the stream from the first block on that is not stored; rank 0 writes."""
    world.on_main(lambda: _check_room(folder, layout))
    digests = world.on_main(lambda: _read_digests(folder))
    done = len(digests) * layout.rows_per_epoch
    total = layout.epochs * layout.rows_per_epoch + layout.val_rows
    track = Track(f"{name} runs the teacher", total, "images", start=done, quiet=not world.is_main)
    with track, Writer(world.is_main) as writer:
        for block in range(len(digests), layout.epochs + 1):
            with ExitStack() as stack:
                files: ArrayFiles = []
                writer.write(partial(_open_block, folder, layout, block, files, stack))
                for output in _outputs(block, layout, source, world):
                    writer.write(partial(_write_rows, files, output))
                    done += len(output.values)
                    track.update(done)
                    vote = world.vote(failed=writer.failed)
                    if vote.failed:
                        world.on_main(writer.check)  # raises on every process
                    if vote.signum:
                        track.line(f"{name}  stop requested; the teacher's logits of {block} epochs are stored")
                        raise Stopped(vote.signum)
                writer.write(partial(_complete_block, folder, metadata, files, digests))
        world.on_main(writer.check)
        track.line(f"{name}  stored the teacher's logits: {folder}")


def _outputs(block: int, layout: Layout, source: LogitsSource, world: World) -> Iterator[TeacherOutput]:
    """What is stored in a block, row after row, gathered from all processes; a collective."""
    outputs = (compress(logits, layout.top_k, layout.temperature).tensors for logits in source(block))
    if block < layout.epochs:
        for tensors in outputs:
            yield TeacherOutput(*map(world.gather, tensors))
        return
    counts = [len(validation_part(layout.val_rows, rank, world.size)) for rank in range(world.size)]
    gathered = []
    for rows in map(torch.cat, zip(*outputs, strict=True)):  # parts differ by one row at most: padded to be gathered
        parts = world.gather(F.pad(rows, (0, 0, 0, max(counts) - len(rows)))).chunk(world.size)
        gathered.append(torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]))
    yield TeacherOutput(*gathered)


ArrayFiles = list[tuple[str, np.dtype[Any], HashingFile]]  # of a block while it is written


def _open_block(folder: Path, layout: Layout, block: int, files: ArrayFiles, stack: ExitStack) -> None:
    """Open the arrays of a block at its first row: what a process that was killed wrote there is cut off.

    They are written, not mapped: on a full disk a write raises an error, a store to mapped memory is a SIGBUS.
    """
    for name, dtype, shape in layout.arrays(block):
        path = folder / f"{name}.npy"
        path.touch()
        file = stack.enter_context(path.open("r+b"))
        np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + layout.block_rows(block).start * shape[1] * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        files.append((name, dtype, HashingFile(file)))


def _write_rows(files: ArrayFiles, output: TeacherOutput) -> None:
    for (_, dtype, file), rows in zip(files, output.tensors, strict=True):
        file.write(np.ascontiguousarray(rows.cpu().numpy(), dtype).data)


def _complete_block(folder: Path, metadata: Metadata, files: ArrayFiles, digests: list[dict[str, str]]) -> None:
    """Put the rows of a block on the disk, and only then say that they are there."""
    digests.append({name: file.sync() for name, _, file in files})
    description = {"metadata": metadata, "sha256": digests}
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")


def _lock(folder: Path, stack: ExitStack) -> bool:
    """Whether this job is the one that writes, until the stack unwinds."""
    folder.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(try_lock(folder / "lock"))


def _check_room(folder: Path, layout: Layout) -> None:
    """Raises RunError if the disk is too small for what is not written yet."""
    arrays = [*layout.arrays(0), *layout.arrays(layout.epochs)]
    missing = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in arrays)
    missing -= sum(path.stat().st_size for path in folder.glob("*.npy"))
    disk = os.statvfs(folder)
    if (free := disk.f_bavail * disk.f_frsize) < missing:
        raise RunError(
            f"{folder}: the teacher's logits take {missing / 1e9:,.1f} GB more, {free / 1e9:,.1f} GB are free; "
            "free disk space, or store only the top classes (top_k)"
        )


def _read_digests(folder: Path) -> list[dict[str, str]]:
    """The digests of the stored blocks, by array. Raises RunError if the description is damaged."""
    try:
        digests: list[dict[str, str]] = json.loads((folder / DESCRIPTION).read_text())["sha256"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, DESCRIPTION) from error
    return digests


def _damaged(folder: Path, name: str) -> RunError:
    file = folder / (name if name == DESCRIPTION else f"{name}.npy")
    return RunError(f"{file}: damaged; delete {folder}, and the same command runs the teacher again")
