"""The processes of a run: who am I, which device is mine, how do we speak. Reads only torchrun's variables."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a process that waits longer for the others ends with an error
_PR_SET_PDEATHSIG = 1

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, computing on `device` with `num_threads` CPU threads."""

    rank: int
    size: int
    device: torch.device
    num_threads: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: Value) -> Value:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the main process's batch-norm statistics, which are the ones that are kept."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module`, with the gradients of its trainable parameters averaged over the processes.

        Batch-norm statistics stay each process's own: the main process's are the module's (`share_buffers`), which
        is what DDP's per-step broadcast would leave behind, without its cost.
        """
        if self.size == 1:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    @staticmethod
    def gradients_apart(wrapped: nn.Module, apart: bool = True) -> AbstractContextManager[None]:
        """Inside, if `apart`, gradients of a wrapped module add up in each process and are not averaged yet."""
        if apart and isinstance(wrapped, DistributedDataParallel):
            return wrapped.no_sync()
        return nullcontext()


@contextmanager
def join() -> Iterator[World]:
    """Join the process group that torchrun (or a Slurm job with the same variables) describes."""
    _end_with_parent()
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _TORCHRUN_VARIABLES)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    num_threads = int(os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // local_size)))
    torch.set_num_threads(num_threads)
    if size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield World(rank, size, device, num_threads)
    finally:
        if size > 1:
            dist.destroy_process_group()


_TORCHRUN_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _end_with_parent() -> None:
    """Ask the kernel to end this process when the launcher is killed: an orphan would go on writing."""
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(ctypes, "CDLL"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
