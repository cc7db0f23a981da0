"""A training process in which something goes wrong, on the stand-in for NCCL: see `tests/test_failures.py`.

`python -m tests.faults FAULT MOMENT RUN STAGE/NETWORK...`; the file MOMENT is written when the fault happens.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gowide_dist import pipeline
from gowide_dist.data.loader import Loader
from gowide_dist.errors import DataError
from gowide_dist.train import loop, start, student
from tests import nccl

RANK = int(os.environ.get("RANK", "0"))
FAULTY_STEP = 3


def at_step(wrong: Callable[[], None], rank: int) -> None:
    """Let something go wrong on a rank in the middle of training."""
    train_step = loop.StageTraining._train_step

    def faulty(self, *arguments):
        if rank == RANK and self.step == FAULTY_STEP:
            wrong()
        train_step(self, *arguments)

    loop.StageTraining._train_step = faulty


def full_disk(module: object, name: str, moment: Path) -> None:
    def full(*arguments: object, **options: object) -> None:
        moment.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setattr(module, name, full)


def arrange(fault: str, moment: Path) -> None:
    def raised(error: Exception) -> Callable[[], None]:
        def wrong() -> None:
            moment.touch()
            raise error

        return wrong

    def killed(signum: signal.Signals) -> Callable[[], None]:
        def wrong() -> None:
            moment.touch()
            os.kill(os.getpid(), signum)

        return wrong

    match fault:
        case "data":
            at_step(raised(DataError("train.beton: image 7 is damaged; encode it again")), rank=1)
        case "damaged":
            preflight = Loader.preflight

            def damaged(self, num_classes):
                if RANK == 1:
                    raised(DataError("train.beton: its index is damaged; encode it again"))()
                preflight(self, num_classes)

            Loader.preflight = damaged
        case "memory":
            at_step(raised(torch.OutOfMemoryError("CUDA out of memory")), rank=1)
        case "crash":
            at_step(raised(ZeroDivisionError("a mistake of ours")), rank=1)
        case "disk at a save":
            full_disk(student, "save_checkpoint", moment)
        case "disk at the finish":
            full_disk(student, "save_weights", moment)
        case "not finite":

            def spoil(self, *arguments):
                if RANK == 0:
                    next(self.objective.parameters()).data[:] = float("nan")
                    moment.touch()
                save(self, *arguments)

            save, student.Student.save = student.Student.save, spoil
        case "weights":  # only one process finds a file unreadable
            load = start.load_trained

            def unreadable(*arguments):
                if RANK == 1:
                    raised(OSError(errno.EACCES, "Permission denied", "model.safetensors"))()
                return load(*arguments)

            start.load_trained = unreadable
        case "SIGKILL" | "SIGSTOP" | "SIGBUS" | "SIGILL":
            at_step(killed(signal.Signals[fault]), rank=1)
        case "lock":
            moment.touch()
        case _:
            raise AssertionError(fault)


def main(arguments: list[str]) -> int:
    fault, moment, *rest = arguments
    nccl.install()
    arrange(fault, Path(moment))
    return pipeline.main(rest)


if __name__ == "__main__":
    from gowide_dist.launch.local import leave

    leave(main(sys.argv[1:]))
