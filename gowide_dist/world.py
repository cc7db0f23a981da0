"""The processes of a run: rank, device and collectives of this process. Reads only torchrun's variables."""

from __future__ import annotations

import functools
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gowide_dist import stop
from gowide_dist.errors import UserError, may_pass, number_from
from gowide_dist.machine import check_known, mend_loopback, num_cores

# A process that waits longer for the others ends with an error.
COLLECTIVE_TIMEOUT = timedelta(seconds=number_from("GOWIDE_COLLECTIVE_TIMEOUT_S", 600, least=1))
_GLOO_THREADS_SETTLE_S = 0.1
_COALESCED_BYTES = 250 * 2**20  # DDP's own number
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
GPUS_VARIABLE = "GOWIDE_GPUS_PER_NODE"  # how many the launcher expects this node to have

Value = TypeVar("Value")


class Vote(NamedTuple):
    """What all processes know together. signum: the greatest number of a signal that one got, else 0."""

    signum: int
    failed: bool  # whether one has failed in a way that it has not raised yet


class Ballot:
    """Tells all processes at the same step that one of them was asked to stop, or has failed.

    The votes of one call are counted at the next, a training step later, so that nobody waits for them: neither
    process nor GPU. They travel over gloo, beside whatever carries the gradients.
    """

    def __init__(self, num_processes: int) -> None:
        self._pending: tuple[Tensor, Any] | None = None  # the votes and the collective that adds them up
        self._group: Any = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if num_processes > 1 else None

    def vote(self, failed: bool) -> Vote:
        """Vote, and count the votes of the call before."""
        if self._group is None:
            return Vote(stop.received(), failed)
        result = self.settle()
        votes = torch.tensor([stop.received(), failed])
        self._pending = votes, dist.all_reduce(votes, dist.ReduceOp.MAX, self._group, async_op=True)
        return result

    def settle(self) -> Vote:
        """Count the votes that are under way."""
        if self._pending is None:
            return Vote(0, False)
        votes, work = self._pending
        work.wait()
        self._pending = None
        signum, failed = votes.tolist()
        return Vote(signum, bool(failed))


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, computing on `device`.

    num_loader_threads: CPU threads that decode images. What PyTorch computes with is another number, OMP_NUM_THREADS:
    a torchrun of the user's own sets it to 1, and one thread does not feed a GPU.
    """

    rank: int
    size: int
    device: torch.device
    num_loader_threads: int
    ballot: Ballot

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    @property
    def device_names(self) -> list[str]:
        """The GPUs of this node, or the CPU."""
        num_gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
        return [torch.cuda.get_device_name(index) for index in range(num_gpus)] or [str(self.device)]

    def vote(self, *, failed: bool = False) -> Vote:
        """What the processes voted at the call before, and this process's vote; see `Ballot`."""
        return self.ballot.vote(failed)

    def on_main(self, task: Callable[[], Value]) -> Value:
        """Run `task` on rank 0: its result, or its exception, on every process. A collective.

        Only what rank 0 can do in less than the collective timeout: the others wait for it.
        """
        if self.size == 1:
            return task()
        outcome: tuple[Value | None, Exception | None] = None, None
        raised: BaseException | None = None
        if self.is_main:
            try:
                outcome = task(), None
            except BaseException as error:
                raised = error
                outcome = None, _portable(error)
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise raised or failure
        return cast(Value, value)

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
        """Rank 0's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every process rank 0's batch-norm statistics, which are the ones that are kept."""
        if self.size > 1:  # one collective for all of a type, as DDP does it: a ResNet-50 has 159 buffers
            dist._broadcast_coalesced(dist.group.WORLD, list(module.buffers()), _COALESCED_BYTES, 0)  # type: ignore

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


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of this process on which batches are copied to a GPU, beside what it computes on its current one."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on the device. A copy to a GPU waits for nothing, and what is computed next waits for the copy alone."""
    if device.type != "cuda":
        return values.to(device)
    if not values.is_pinned():
        values = values.pin_memory()
    with torch.cuda.stream(copy_stream(device)):
        copy = values.to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(copy_stream(device))
    copy.record_stream(current)  # its memory was allocated for the other stream
    return copy


class PeerError(Exception):
    """Another process has failed, and says why."""


def _portable(error: BaseException) -> Exception:
    """What other processes raise for an error of rank 0: the same if it is for the user, and can travel."""
    if isinstance(error, UserError) and not may_pass(error):
        with suppress(Exception):
            return cast(UserError, pickle.loads(pickle.dumps(error)))
    return PeerError(f"rank 0: {error!r}")


def peer_failure(error: BaseException) -> str | None:
    """What to say of an error whose cause is another process: that one has its own words, which must not be drowned."""
    text = str(error)
    if isinstance(error, PeerError):
        return text
    if not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)):
        return None
    if "timed out" in text.lower():
        timeout = f"{COLLECTIVE_TIMEOUT.total_seconds():g} s"
        return f"waited for another process longer than the collective timeout ({timeout}, GOWIDE_COLLECTIVE_TIMEOUT_S)"
    return "lost the connection to another process"


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this process, or the CPU where the launcher expects no GPU.

    Raises UserError if GPUs are expected (GPUS_VARIABLE) and PyTorch sees none, or if there are more processes than
    GPUs. A Slurm task may see its own GPU alone, whatever its rank; processes of one torchrun all see the same ones.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    expected = number_from(GPUS_VARIABLE, 0)
    if not num_gpus:
        if expected:
            raise UserError(
                f"{expected} GPUs are expected on this node, but PyTorch {torch.__version__} sees none: its CUDA "
                f"{torch.version.cuda} may need a newer driver (see nvidia-smi); to train on the CPU, set "
                "CUDA_VISIBLE_DEVICES to nothing"
            )
        return torch.device("cpu")
    sees_own_gpu_alone = num_gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    index = 0 if sees_own_gpu_alone else local_rank
    if index >= num_gpus:
        raise UserError(f"more processes than GPUs ({num_gpus}): there is one process per GPU, --nproc {num_gpus}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _check_interfaces() -> None:
    """Raises UserError if gloo is told to use a network interface that this node does not have."""
    existing = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in existing:
            raise UserError(
                f"GLOO_SOCKET_IFNAME={name}: this node has no such network interface; unset it, or name one of "
                f"{', '.join(existing)}"
            )


@contextmanager
def join() -> Iterator[World]:
    """Join the process group that torchrun (or a Slurm job with the same variables) describes.

    The group is destroyed only at an end on which all processes agree: at a regular one, and when all were told to
    stop. Under NCCL destroying it is itself a collective: a process that fails alone would wait in it for the others,
    which wait for this one in theirs. After any other exception the caller leaves at once, by `os._exit`.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    device = choose_device(local_rank)
    cores = max(1, num_cores() // local_size)
    torch.set_num_threads(max(1, number_from("OMP_NUM_THREADS", cores)))
    if size > local_size:
        check_known(os.environ["MASTER_ADDR"])
        mend_loopback([os.environ["MASTER_ADDR"]])
    if size > 1:
        _check_interfaces()
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(BACKENDS[device.type], timeout=COLLECTIVE_TIMEOUT, device_id=device_id)
    world = World(rank, size, device, cores, Ballot(size))
    stopped: stop.Stopped | None = None
    try:
        yield world
    except stop.Stopped as error:
        stopped = error
    if size > 1:
        world.ballot.settle()
        dist.destroy_process_group()
        # DDP leaves a reference to the group behind, so that gloo's threads outlive it. One that wants the
        # interpreter, to let go of its last work's objects, while that is ending makes the process abort.
        time.sleep(_GLOO_THREADS_SETTLE_S)
    if stopped:
        raise stopped
