"""The processes of a run: who am I, which device is mine, how do we speak. Reads only torchrun's variables."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gowide_dist import stop
from gowide_dist.collector import collect_as_usual

# A process that waits longer for the others ends with an error.
COLLECTIVE_TIMEOUT = timedelta(seconds=int(os.environ.get("GOWIDE_COLLECTIVE_TIMEOUT_S", "600")))
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_GLOO_THREADS_SETTLE_S = 0.1

Value = TypeVar("Value")


class StopVote:
    """Whether a process was asked to stop. All processes learn of it at the same call.

    The votes of one call are counted at the next, a training step later, so that nobody waits for them: neither
    process nor GPU. They travel over gloo, beside whatever carries the gradients.
    """

    def __init__(self, num_processes: int) -> None:
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Tensor, dist.Work] | None = None
        if num_processes > 1:
            group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            assert isinstance(group, dist.ProcessGroup), "every process is in it"
            self._group = group

    def __call__(self) -> int:
        """Vote, and count the votes of the call before: the number of the signal that a process got, else 0."""
        if self._group is None:
            return stop.received()
        if signum := self.settle():
            return signum
        votes = torch.tensor([stop.received()])
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._pending = votes, work
        return 0

    def settle(self) -> int:
        """Count the votes that are under way."""
        if self._pending is None:
            return 0
        votes, work = self._pending
        work.wait()
        self._pending = None
        return int(votes)


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, computing on `device` with `num_threads` CPU threads."""

    rank: int
    size: int
    device: torch.device
    num_threads: int
    stop_vote: StopVote

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The values [B, ...] of all processes, equal in shape, one after the other: [size * B, ...]."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def broadcast(self, value: Value) -> Value:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every process the main process's batch-norm statistics, which are the ones that are kept."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module`, with the gradients of its trainable parameters averaged over the processes.

        Batch-norm statistics stay each process's own: the main process's are the module's (`broadcast_buffers`), which
        is what DDP's per-step broadcast would leave behind, without its cost. Buckets have DDP's own size and the graph
        is not declared static: with 1 and 100 MiB, or static, two processes on CPUs were no faster beyond the spread.
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
    def communication_s(wrapped: nn.Module) -> float:
        """Seconds of a step in which a wrapped module's gradients travel, or wait for other processes to be ready,
        while nothing else is computed. Averaged since it was wrapped over the steps that DDP times: the first ten and
        every hundredth.
        """
        if not isinstance(wrapped, DistributedDataParallel):
            return 0.0
        timed: dict[str, int] = wrapped._get_ddp_logging_data()  # type: ignore[no-untyped-call]  # nanoseconds
        hidden = timed.get("avg_backward_compute_comm_overlap_time", 0)
        return max(0, timed.get("avg_backward_comm_time", 0) - hidden) / 1e9

    @staticmethod
    def no_sync(wrapped: nn.Module, skip: bool = True) -> AbstractContextManager[None]:
        """Inside, if `skip`, gradients of a wrapped module add up in each process and are not averaged yet."""
        if skip and isinstance(wrapped, DistributedDataParallel):
            return wrapped.no_sync()
        return nullcontext()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on the device; to a GPU without waiting for what it computes, which a copy from pageable memory may."""
    if device.type == "cuda" and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@contextmanager
def join() -> Iterator[World]:
    """Join the process group that torchrun (or a Slurm job with the same variables) describes."""
    collect_as_usual()
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _TORCHRUN_VARIABLES)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _keep_freed_memory()
    num_threads = int(os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // local_size)))
    torch.set_num_threads(num_threads)
    if size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    try:
        vote = StopVote(size)
        yield World(rank, size, device, num_threads, vote)
        vote.settle()
    finally:
        if size > 1:
            dist.destroy_process_group()
            # DDP leaves a reference to the group behind, so that gloo's threads outlive it. One that wants the
            # interpreter, to let go of its last work's objects, while that is ending makes the process abort.
            time.sleep(_GLOO_THREADS_SETTLE_S)


_TORCHRUN_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, for the next step, which wants the same again.

    Else it returns large blocks to the kernel, which clears every page anew: up to a fifth of a step on CPUs.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # not in every C library
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_MMAP_MAX, 0)  # no block apart from the heap
