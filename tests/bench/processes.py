"""Training in processes of its own: two against one, and how soon it starts."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gowide_dist.networks.architecture import Architecture
from gowide_dist.recipe import Recipe
from gowide_dist.run import read_metrics
from tests.bench.pairs import Figure, in_turns, spread
from tests.bench.subject import Subject, open_member

_STEPS_PER_TURN = 4
_STARTS = 3
_START_LIMIT_S = 300.0


def two_processes(subject: Subject) -> Figure:
    """Images per second of two gloo processes with a thread each, over one process with two threads.

    They train on labels, on images from the loader, at the same global batch. Beside it, for student and teacher, the
    part of the two processes' time that goes into averaging gradients: what a step takes less without.
    """
    instances = subject.recipe.instances
    teachers = [instances[one.teacher].architecture for one in instances.values() if one.teacher]
    seconds, communication = _two_over_one(subject, subject.student)
    details: dict[str, Any] = {"gradient_communication_share": communication}
    for teacher in teachers[:1]:
        seconds_of_teacher, communication = _two_over_one(subject, teacher)
        ratio = spread(seconds_of_teacher["one"], seconds_of_teacher["two"])
        details["teacher"] = {**ratio, "gradient_communication_share": communication}
    return Figure.of(
        "images a second of two gloo processes with one thread each over one with two threads, student on labels",
        "at least 0.95",
        seconds["one"],
        seconds["two"],
        **details,
    )


def _two_over_one(subject: Subject, architecture: Architecture) -> tuple[dict[str, list[float]], float]:
    """Seconds of some steps in `one` process and in `two`, and the part of communication of the two."""
    with (
        _start_group(subject.recipe, architecture, 1, num_threads=2) as one,
        _start_group(subject.recipe, architecture, 2, num_threads=1) as two,
    ):
        sides = {"one": lambda: _train(one), "two": lambda: _train(two), "no_sync": lambda: _train(two, no_sync=True)}
        seconds = in_turns("two_processes", sides, subject.effort)
    return seconds, round(1 - spread(seconds["no_sync"], seconds["two"])["ratio"], 3)


def _train(group: Sequence[Connection], *, no_sync: bool = False) -> None:
    """Let the processes of a group train a few steps. no_sync: without averaging gradients."""
    for pipe in group:
        pipe.send(no_sync)
    for pipe in group:
        pipe.recv()


@contextmanager
def _start_group(
    recipe: Recipe, architecture: Architecture, num_processes: int, num_threads: int
) -> Iterator[list[Connection]]:
    """Processes on the CPU that train a network on labels whenever they are told to, by their pipes."""
    recipe.check_processes(num_processes)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(num_processes):
            pipe, other_end = context.Pipe()
            variables = {
                "RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_processes,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": num_threads, "CUDA_VISIBLE_DEVICES": "",
            }  # fmt: skip
            process = context.Process(target=_member, args=(other_end, variables, recipe, architecture), daemon=True)
            process.start()
            other_end.close()  # so that its death is seen as the end of the pipe
            pipes.append(pipe)
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.kill()  # it has nothing to lose
            process.join()


def _member(pipe: Connection, variables: Mapping[str, Any], recipe: Recipe, architecture: Architecture) -> None:
    """A process of a group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    os.environ.update({name: str(value) for name, value in variables.items()})
    with open_member(recipe, architecture) as (step, world, batches):
        while True:
            no_sync = pipe.recv()
            for _ in range(_STEPS_PER_TURN):
                step(*next(batches), no_sync=no_sync)
                world.vote()  # as the training loop does
            pipe.send("done")


def start_seconds(subject: Subject) -> Figure:
    """Seconds from `gowide run` to the end of its first training step, with as many processes as it takes by itself."""
    seconds = [_start(subject, subject.folder / f"start-{turn}") for turn in range(min(_STARTS, subject.effort.pairs))]
    return Figure.around("seconds from `gowide run` to the end of the first training step", "at most 20", seconds)


def _start(subject: Subject, folder: Path) -> float:
    folder.mkdir()
    job, runs = folder / "job.yaml", folder / "runs"
    job.write_text(subject.recipe.model_copy(update={"log_every_steps": 1}).to_yaml())
    command = [sys.executable, "-c", "from gowide_dist.cli import main; main()", "run", str(job), "--runs", str(runs)]
    start = time.perf_counter()
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            while not any(read_metrics(path) for path in runs.glob("*/stages/*/*/metrics.jsonl")):
                if process.poll() is not None or time.perf_counter() - start > _START_LIMIT_S:
                    errors.seek(0)
                    raise RuntimeError(f"`gowide run` did not start to train: {errors.read()}")
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            process.terminate()  # its workers have sessions of their own: it ends them, and they write until then
            process.wait()
