"""Training in processes of its own: several against one, how soon it starts, and how it grows."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gowide_dist.errors import UserError
from gowide_dist.insight.assumed import cores_here, device_of
from gowide_dist.insight.bench.pairs import Effort, Figure, in_turns, spread
from gowide_dist.insight.bench.subject import Subject, TrainingStep, endless_batches
from gowide_dist.insight.costs import BACKWARD
from gowide_dist.insight.simulate import Cluster, Work, all_reduce_s, step_s
from gowide_dist.networks.architecture import Architecture
from gowide_dist.networks.resnet import build_network
from gowide_dist.pipeline import open_images
from gowide_dist.prepare import check_data
from gowide_dist.recipe import Recipe
from gowide_dist.run import read_metrics
from gowide_dist.train.objectives import Labels
from gowide_dist.world import join

_STEPS_PER_TURN = 4
_WARM_UP_STEPS = 10  # until buffers, kernels and freed memory are there to be used again
_STARTS = 3
_START_LIMIT_S = 300.0


class Report(NamedTuple):
    """What a process says after some steps: how long they took, and the most memory that it has had."""

    seconds: float
    memory_mib: float


class Group:
    """Processes on the CPU that train a network on labels, on the recipe's images, whenever they are told to."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def train(self, num_steps: int, *, apart: bool = False) -> Report:
        """Train so many steps; the slowest process's seconds, the memory of all. apart: gradients stay unaveraged."""
        return self._do("apart" if apart else "train", num_steps)

    def average(self, times: int) -> Report:
        """Average as many numbers as the network has parameters, so many times, and compute nothing."""
        return self._do("average", times)

    def _do(self, what: str, times: int) -> Report:
        for pipe in self._pipes:
            pipe.send((what, times))
        try:
            reports = [Report(*pipe.recv()) for pipe in self._pipes]
        except EOFError as error:
            raise RuntimeError("bench: a training process ended; it has said why") from error
        return Report(max(one.seconds for one in reports), sum(one.memory_mib for one in reports))


@contextmanager
def start_group(recipe: Recipe, architecture: Architecture, num_processes: int, num_threads: int) -> Iterator[Group]:
    """Start the processes, with so many threads each, and end them."""
    recipe.check_processes(num_processes)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(num_processes):
            ours, theirs = context.Pipe()
            variables = {
                "RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_processes,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": num_threads, "CUDA_VISIBLE_DEVICES": "",
            }  # fmt: skip
            process = context.Process(target=_member, args=(theirs, variables, recipe, architecture), daemon=True)
            process.start()
            theirs.close()  # so that its death is seen as the end of the pipe
            pipes.append(ours)
            processes.append(process)
        yield Group(pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.kill()  # it has nothing to lose
            process.join()


def _member(pipe: Connection, variables: dict[str, Any], recipe: Recipe, architecture: Architecture) -> None:
    """A process of a group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    os.environ.update({name: str(value) for name, value in variables.items()})
    recipe, _ = check_data(recipe)
    with join() as world, open_images(recipe, world) as images:
        torch.manual_seed(0)
        network = build_network(architecture, images.num_classes).to(memory_format=torch.channels_last)
        step = TrainingStep(Labels(network), recipe, world)
        stream = endless_batches(images, recipe.seed)
        gradients = torch.zeros(sum(parameter.numel() for parameter in network.parameters()))
        while command := _next(pipe):
            what, times = command
            start = time.perf_counter()
            for _ in range(times):
                if what == "average":
                    world.sum(gradients)
                else:
                    step(*next(stream), apart=what == "apart")
                    world.stop_vote()  # as the training loop does
            pipe.send((time.perf_counter() - start, _peak_memory_mib()))
        stream.close()


def _next(pipe: Connection) -> tuple[str, int] | None:
    try:
        command: tuple[str, int] = pipe.recv()
    except EOFError:
        return None
    return command


def _peak_memory_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def two_processes(subject: Subject) -> Figure:
    """Images a second of two gloo processes with a thread each, over one process with two threads.

    They train on labels, on images from the loader, at the same global batch. Beside it, for student and teacher, the
    share of the two processes' time that goes into averaging gradients: what a step takes less without.
    """
    student, *others = dict.fromkeys([subject.student, *_teachers(subject.recipe)])
    of_student, of_teachers = _two_over_one(subject, student), [_two_over_one(subject, other) for other in others[:1]]
    seconds, share = of_student
    details: dict[str, Any] = {"gradient_communication_share": share}
    for seconds_of_teacher, share_of_teacher in of_teachers:
        details["teacher"] = {
            **spread(seconds_of_teacher["one"], seconds_of_teacher["two"]),
            "gradient_communication_share": share_of_teacher,
        }
    return Figure.of(
        "images a second of two gloo processes with one thread each over one with two threads, student on labels",
        "at least 0.95",
        seconds["one"],
        seconds["two"],
        **details,
    )


def _teachers(recipe: Recipe) -> Iterator[Architecture]:
    for instance in recipe.instances.values():
        if instance.teacher:
            yield recipe.instances[instance.teacher].architecture


def _two_over_one(subject: Subject, architecture: Architecture) -> tuple[dict[str, list[float]], float]:
    """Seconds of some steps in `one` process and in `two`, and the share of communication of the two."""
    with (
        start_group(subject.recipe, architecture, 1, num_threads=2) as one,
        start_group(subject.recipe, architecture, 2, num_threads=1) as two,
    ):
        seconds = in_turns(
            "two_processes",
            {
                "one": lambda: one.train(_STEPS_PER_TURN),
                "two": lambda: two.train(_STEPS_PER_TURN),
                "apart": lambda: two.train(_STEPS_PER_TURN, apart=True),
            },
            subject.effort,
        )
    without = spread(seconds["apart"], seconds["two"])["ratio"]
    return seconds, round(1 - without, 3)


def simulation(subject: Subject) -> Figure:
    """A step of two processes as `plan --scale` simulates it, over one that was measured.

    The simulation is told what a process computes in a second, at twice its share of the batch and while the other one
    computes too, and how fast the two average as many numbers as they have gradients; the rest is its own.
    """
    of_student, *of_teacher = [
        _simulated(subject, architecture) for architecture in [subject.student, *list(_teachers(subject.recipe))[:1]]
    ]
    details: dict[str, Any] = {"teacher": spread(*of_teacher[0])} if of_teacher else {}
    return Figure.of(
        "seconds of a step of two processes with one thread each, simulated over measured; on labels",
        "about 1", *of_student, **details,
    )  # fmt: skip


def _simulated(subject: Subject, architecture: Architecture) -> tuple[list[float], list[float]]:
    """Seconds of a step of two processes, pair for pair: simulated, and measured."""
    recipe = subject.recipe
    classes = recipe.data.classes
    assert classes is not None, "a subject's recipe is resolved"
    flops = 2 * (1 + BACKWARD) * architecture.macs(classes, recipe.data.resolution)
    gradient_bytes = 4 * architecture.num_parameters(classes)
    work = Work(recipe.batch_size, flops, 0.0, 0.0, gradient_bytes, 0.0)
    with (
        start_group(recipe.model_copy(update={"batch_size": 2 * recipe.batch_size}), architecture, 2, 1) as apart,
        start_group(recipe, architecture, 2, num_threads=1) as two,
    ):
        seconds = in_turns(
            "simulation",
            {
                "apart": lambda: apart.train(_STEPS_PER_TURN, apart=True),
                "two": lambda: two.train(_STEPS_PER_TURN),
                "average": lambda: two.average(_STEPS_PER_TURN),
            },
            subject.effort,
        )
    simulated = []
    overlap = device_of(cores_here(2), is_cluster=False).overlap
    for apart_s, average_s in zip(seconds["apart"], seconds["average"], strict=True):
        bandwidth = all_reduce_s(gradient_bytes, 2, 1.0) * _STEPS_PER_TURN / average_s
        node = Cluster(
            devices_per_node=2, device_flops=recipe.batch_size * flops * _STEPS_PER_TURN / apart_s,
            within_node_bytes_s=bandwidth, between_nodes_bytes_s=math.inf, overlap=overlap,
            images_s_per_node=math.inf, write_bytes_s=math.inf, start_s=0.0, timeout_s=math.inf,
            checkpoint_every_s=math.inf,
        )  # fmt: skip
        simulated.append(step_s(work, node, 1, recipe.batch_size).total * _STEPS_PER_TURN)
    return simulated, seconds["two"]


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
                    raise UserError(f"bench: `gowide run` did not start to train: {errors.read().strip()[-200:]}")
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def growth(recipe: Recipe, effort: Effort, times: Sequence[int] = (1, 2, 4)) -> dict[str, list[dict[str, float]]]:
    """Seconds and memory of training the first network that a teacher teaches, at 1, 2 and 4 times of three things.

    Images (steps), width (of the 3x3 filters) and processes (which share the cores and the batch), each from processes
    of its own. Every row says how many times (`times`), `seconds`, `memory_mib` (most, of all processes), and both
    over the first row's (`seconds_ratio`, `memory_ratio`).
    """
    instances = recipe.instances.values()
    network = next((one for one in instances if one.teacher), next(iter(instances))).architecture
    cores = len(os.sched_getaffinity(0))
    once, *more = times
    assert once == 1
    with start_group(recipe, network, 1, cores) as group:
        group.train(_WARM_UP_STEPS)
        steps = max(1, round(effort.seconds / group.train(1).seconds))
        first = group.train(steps)

    def train(num_steps: int, architecture: Architecture = network, num_processes: int = 1) -> Report:
        with start_group(recipe, architecture, num_processes, max(1, cores // num_processes)) as group:
            group.train(_WARM_UP_STEPS)
            return group.train(num_steps)

    processes = [count for count in more if count <= cores and recipe.batch_size % count == 0]
    return {
        "images": _rows({1: first} | {count: train(count * steps) for count in more}),
        "width": _rows({1: first} | {count: train(steps, network.widened(count)) for count in more}),
        "processes": _rows({1: first} | {count: train(steps, num_processes=count) for count in processes}),
    }


def _rows(reports: dict[int, Report]) -> list[dict[str, float]]:
    first = reports[1]
    return [
        {
            "times": times,
            "seconds": round(report.seconds, 3),
            "memory_mib": round(report.memory_mib),
            "seconds_ratio": round(report.seconds / first.seconds, 2),
            "memory_ratio": round(report.memory_mib / first.memory_mib, 2),
        }
        for times, report in reports.items()
    ]
