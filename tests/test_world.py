"""What several processes compute together is what one would compute alone."""

import logging
import os
import signal
import sys

import pytest
import torch

from gowide_dist import build_network
from gowide_dist.errors import UserError
from gowide_dist.launch.local import WorkerError, leave, torchrun
from gowide_dist.pipeline import work
from gowide_dist.timeline import Batching
from gowide_dist.train.objectives import Labels
from gowide_dist.world import join

BATCH = 12


def gradients(world, path):
    """Gradients of this process's part of one batch, averaged over the processes. Batch norm in eval mode."""
    torch.manual_seed(world.rank)  # DDP gives all processes the main process's weights
    objective = Labels(build_network({"block": "basic", "depths": [1, 1], "base": 8}, 10)).eval()
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    local = Batching(BATCH, world.size, world.rank).local_rows(0)
    part = slice(local.start, local.stop)
    wrapped = world.wrap(objective)  # lives until the backward pass: without it nothing is averaged
    wrapped(images[part], labels[part])["loss"].backward()
    if world.is_main:
        torch.save({name: parameter.grad for name, parameter in objective.named_parameters()}, path)


def fail(world, path):
    raise RuntimeError(f"process {world.rank}")


def refuse(world, path):
    raise UserError(f"cannot be done by {world.size} processes")


@pytest.mark.parametrize("num_processes", [2, 3])
def test_gradients_are_those_of_one_process_on_the_joined_batch(tmp_path, num_processes):
    torchrun("tests.test_world", ["gradients", str(tmp_path / "many.pt")], num_processes)
    torchrun("tests.test_world", ["gradients", str(tmp_path / "one.pt")], 1)
    many, one = torch.load(tmp_path / "many.pt"), torch.load(tmp_path / "one.pt")
    assert many.keys() == one.keys()
    for name, gradient in one.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(many[name], gradient, rtol=1e-4, atol=1e-6), name


def test_a_workers_refusal_reaches_the_user(tmp_path):
    environment, silent_up_to = dict(os.environ), logging.root.manager.disable
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(UserError, match="cannot be done by 2 processes"):
        torchrun("tests.test_world", ["refuse", str(tmp_path)], 2)
    assert dict(os.environ) == environment
    assert logging.root.manager.disable == silent_up_to
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_failed_worker_is_told_from_a_refusal(tmp_path):
    with pytest.raises(WorkerError, match=r"process \d ended with exit code 1"):
        torchrun("tests.test_world", ["fail", str(tmp_path)], 2)


if __name__ == "__main__":

    def task():
        with join() as this_world:
            globals()[sys.argv[1]](this_world, sys.argv[2])

    leave(work(task, sys.argv[2]))
