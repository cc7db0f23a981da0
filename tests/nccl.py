"""A stand-in for NCCL: a backend over gloo that behaves like it when a process is gone.

gloo notices a dead peer by its closed connection, and every process raises at once. Under NCCL a missing peer is a
kernel that never ends: here a collective that fails in gloo never returns, and neither does `destroy_process_group`
once that has happened or a peer is missing. After the collective timeout PyTorch's watchdog aborts the process, and so
does this one.

`python -m tests.nccl MODULE ARGUMENTS...` runs a module's `main` on it, as a worker of torchrun or of Slurm.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

from gowide_dist import world

COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "broadcast", "allgather", "_allgather_base", "barrier", "gather", "scatter",
    "reduce", "send", "recv",
)  # fmt: skip


def never_return(error: RuntimeError) -> None:
    """A kernel that waits for a peer; the watchdog's abort comes after the collective timeout."""
    if "timed out" in str(error).lower():  # gloo has waited that long already
        os.abort()
    timer = threading.Timer(world.COLLECTIVE_TIMEOUT.total_seconds(), os.abort)
    timer.daemon = True
    timer.start()
    while True:
        time.sleep(1)


class Work(dist._Work):
    def __init__(self, work: dist._Work) -> None:
        super().__init__()
        self._work = work

    def wait(self, *timeout: object) -> bool:
        try:
            return self._work.wait()
        except RuntimeError as error:
            never_return(error)
            raise

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        self.wait()
        future.set_result(self._work.result())
        return future

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self._work.result()


def forwarded(name: str):
    def collective(self, *arguments, **options):
        try:
            return Work(getattr(self._gloo, name)(*arguments, **options))
        except RuntimeError as error:
            never_return(error)
            raise

    return collective


class StandIn(dist.ProcessGroup):
    """Gloo's collectives, which hang where NCCL's would."""

    def __init__(self, store, rank, size, timeout) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802 -- PyTorch's name
        return "standin"

    def getBackend(self, device):  # noqa: N802
        return self._gloo

    for name in COLLECTIVES:
        locals()[name] = forwarded(name)


def install() -> None:
    """Let every process group of this process that would be gloo's or NCCL's be the stand-in; votes stay gloo's."""
    dist.Backend.register_backend("standin", StandIn, devices=["cpu"])
    world.BACKENDS["cpu"] = "standin"
    destroy = dist.destroy_process_group

    def destroy_process_group(*arguments):
        """A collective: it ends when all processes come to it."""
        dist.barrier()
        destroy(*arguments)

    dist.destroy_process_group = destroy_process_group


def main(arguments: list[str]) -> int:
    """Run `main(arguments)` of a module on the stand-in."""
    install()
    module, *rest = arguments
    status: int = importlib.import_module(module).main(rest)
    return status


if __name__ == "__main__":
    from gowide_dist.launch.local import leave

    leave(main(sys.argv[1:]))
