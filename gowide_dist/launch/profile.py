"""Cluster profiles: where to train, as data. One YAML file per cluster, in `slurm/clusters/`."""

from __future__ import annotations

import functools
import math
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gowide_dist.instances import Instance
from gowide_dist.schema import Count, Fraction, Frozen, Natural, NonNegative, Positive, UserPath, read_yaml, validate

Text = Annotated[str, Field(strict=True, min_length=1)]
# Options of sbatch that a profile has a key for: `sbatch:` refuses them.
_OWN_OPTIONS = {
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "exclude": "exclude",
    "nodes": "nodes", "gpus-per-node": "gpus_per_node", "gres": "gpus_per_node", "gpus": "gpus_per_node",
    "ntasks-per-node": "processes_per_node", "ntasks": "processes_per_node", "cpus-per-task": "cpus_per_task",
    "mem": "mem_gb", "time": "timeout_min", "signal": "signal_delay_s", "export": "environment",
    "requeue": "requeue", "no-requeue": "requeue",
}  # fmt: skip
_OWN_SRUN_OPTIONS = {
    "--cpu-bind": "cpu_bind", "--cpus-per-task": "cpus_per_task", "-c": "cpus_per_task", "--nodes": "nodes",
    "-N": "nodes", "--ntasks": "processes_per_node", "-n": "processes_per_node",
    "--ntasks-per-node": "processes_per_node", "--export": "environment",
}  # fmt: skip
_RESERVED_SRUN_OPTIONS = {
    "--kill-on-bad-exit", "-K", "--output", "-o", "--error", "-e", "--unbuffered", "-u", "--jobid", "--multi-prog",
    "--pty", "--test-only",
}  # fmt: skip
_RESERVED_OPTIONS = {
    "dependency", "kill-on-invalid-dep", "output", "error", "open-mode", "job-name", "array", "wckey", "parsable",
    "wait", "test-only", "wrap",
}  # fmt: skip


def _as_node_range(value: Any) -> Any:
    low, dash, high = str(value).partition("-")
    if not (low.isdecimal() and int(low) >= 1 and (not dash or (high.isdecimal() and int(high) > int(low)))):
        raise ValueError(f"should be a number or a range like 1-4, not '{value}'")
    return str(value)


def _as_minutes(value: Any) -> Any:
    """The minutes of a time as sbatch takes it: 90, 90:30 (with seconds), 12:00:00, 1-12, 1-12:00, 1-00:00:00."""
    if not isinstance(value, str):
        return value
    if not (match := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", value.strip())):
        raise ValueError(f"should be minutes, hours:minutes:seconds or days-hours:minutes:seconds, not '{value}'")
    days, *others = match.groups()
    numbers = [int(number) for number in others if number is not None]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # one or two numbers begin with the minutes, but behind days with the hours
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return math.ceil((24 * int(days or 0) + hours) * 60 + minutes + seconds / 60)


def _as_text(value: Any) -> Any:
    if value is False or not isinstance(value, str | int | float):
        raise ValueError("should be text or a number")
    return value if value is True else str(value)


@functools.cache
def _bash_fault(text: str) -> str:
    """What bash finds wrong with the syntax of shell lines; empty if nothing, or if there is no bash here."""
    try:
        checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return checked.stderr.partition("\n")[0].removeprefix("bash: ") if checked.returncode else ""


class Device(Frozen):
    """The device of one process, for `gowide plan`: assumptions until they are measured.

    tflops: dense, at the recipe's precision, a multiply-add counted as two operations. GB are 10^9 bytes.
    """

    name: Text
    tflops: Positive
    efficiency: Annotated[Fraction, Field(gt=0)] = 0.3  # the fraction of tflops that training reaches
    memory_gb: Positive | None = None
    images_per_s_per_cpu: Positive | None = None  # decoded and augmented by one CPU
    within_node_gb_s: Positive = 300.0  # between two devices of a node
    between_nodes_gb_s: Positive = 25.0  # between two nodes
    overlap: Fraction = 0.8  # the fraction of the gradients' all-reduce that the backward pass can hide
    write_gb_s: Positive = 1.0  # of a checkpoint
    start_s: NonNegative = 60.0  # from the start of a job to its first step

    @property
    def flops(self) -> float:
        """Operations per second that training reaches."""
        return 1e12 * self.tflops * self.efficiency


def this_machine(num_cores: int, memory_gb: float | None = None) -> Device:
    """CPU cores of a machine that no profile describes: 64 GFLOP/s each, two AVX2 units at 2 GHz.

    No overlap: the cores that compute gradients also average them.
    """
    return Device(name=f"{num_cores} CPU cores", tflops=0.064 * num_cores, memory_gb=memory_gb, overlap=0.0)


class Settings(Frozen):
    """Resources that a job asks for; under a profile's `stages` and `encode` those that differ."""

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    constraint: Text | None = None
    exclude: Text | None = None
    nodes: Annotated[str, BeforeValidator(_as_node_range)] = "1"  # or a range like 1-4
    gpus_per_node: Natural = 0  # one process per GPU; `a100:4` also sets gpu_type
    gpu_type: Text | None = None  # of no use to jobs without GPUs, which may inherit it
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"  # of sbatch; some sites know only one
    processes_per_node: Count | None = None  # where there are no GPUs; default 1
    cpus_per_task: Count = 1
    mem_gb: NonNegative | None = None  # per node; 0: all that a node has
    # Of one allocation, in minutes or as sbatch takes it (12:00:00, 1-00:00:00); a longer stage takes several.
    timeout_min: Annotated[Count, BeforeValidator(_as_minutes)] = 60
    signal_delay_s: Count = 120  # how long before the end of an allocation the stage is told to save
    cpu_bind: Text = "cores"  # srun's --cpu-bind
    srun: tuple[Text, ...] = ()  # further options of srun, as --mpi=none or --container-image=...
    python: Text | None = None  # runs Python on the nodes: `apptainer exec --nv image.sif python`; default: this one
    collective_timeout_s: Count = 600  # a process that waits longer for the others ends the job
    together: bool = True  # the networks of a stage in one job, on one data stream; false: each in its own
    requeue: bool = True  # false, where the site forbids it: a job that is to go on submits its follow-up
    retries: Natural = 3  # starts again after a process crashed, hung or was killed
    notify: Text | None = None  # a shell line for the end of each start, with GOWIDE_STATE: done, failed or requeued
    setup: tuple[Text, ...] = ()  # shell lines before the processes start
    environment: dict[Text, Annotated[str, BeforeValidator(_as_text)]] = Field(default_factory=dict)
    device: Device | None = None  # for `gowide plan`
    # Any further option of sbatch, by its long name without the dashes; `true` for one without a value.
    sbatch: dict[Text, Annotated[str | Literal[True], BeforeValidator(_as_text)]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _split_gpus(cls, values: Any) -> Any:
        gpus = values.get("gpus_per_node") if isinstance(values, Mapping) else None
        if not isinstance(gpus, str):
            return values
        kind, _, number = gpus.rpartition(":")
        if not number.isdecimal() or not kind or ":" in kind:
            raise ValueError(f"gpus_per_node: should be a number, or a type and a number as a100:4, not '{gpus}'")
        return {**values, "gpus_per_node": int(number), "gpu_type": kind}


class Resources(Settings):
    """The resources of one job, checked as a whole."""

    @model_validator(mode="after")
    def _check(self) -> Resources:
        if self.gpus_per_node and self.processes_per_node not in (None, self.gpus_per_node):
            raise ValueError("processes_per_node: there is one process per GPU, leave it out beside gpus_per_node")
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ValueError("signal_delay_s: should be less than timeout_min")
        for option in self.srun:
            name = option.partition("=")[0] if option.startswith("--") else option[:2]  # -c4 has no =
            if not name.startswith("-"):
                raise ValueError(f"srun: '{option}' should be an option, as --mpi=none")
            if name in _OWN_SRUN_OPTIONS:
                raise ValueError(f"srun: say {name} with {_OWN_SRUN_OPTIONS[name]}")
            if name in _RESERVED_SRUN_OPTIONS:
                raise ValueError(f"srun: {name} is set by gowide submit")
        for option in self.sbatch:
            name = option.lstrip("-").replace("_", "-")
            if name in _OWN_OPTIONS:
                raise ValueError(f"sbatch.{option}: say it with {_OWN_OPTIONS[name]}")
            if name in _RESERVED_OPTIONS:
                raise ValueError(f"sbatch.{option}: is set by gowide submit")
        self._check_shell()
        return self

    def _check_shell(self) -> None:
        """Raises ValueError for what bash would not read: it would break the batch script, or never be run."""
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"environment: '{name}' should be the name of a variable")
        for line in self.setup:
            if line.lstrip().startswith("#SBATCH"):
                raise ValueError(f"setup: '{line}' comes too late for sbatch; say it under sbatch")
        for key, text in (("setup", "\n".join(self.setup)), ("notify", self.notify), ("python", self.python)):
            if text and (fault := _bash_fault(text)):
                raise ValueError(f"{key}: bash cannot read it: {fault}")

    @property
    def gpus_of_node(self) -> str | None:
        """The GPUs of a node as sbatch takes them: 4, or a100:4."""
        return ":".join(filter(None, (self.gpu_type, str(self.gpus_per_node)))) if self.gpus_per_node else None

    @property
    def mem(self) -> str | None:
        """The memory of a node as sbatch takes it."""
        if self.mem_gb is None:
            return None
        return f"{self.mem_gb:g}G" if float(self.mem_gb).is_integer() else f"{math.ceil(1024 * self.mem_gb)}M"

    @property
    def tasks_per_node(self) -> int:
        """Processes of a node, each a Slurm task."""
        return self.gpus_per_node or self.processes_per_node or 1

    @property
    def num_processes(self) -> list[int]:
        """The numbers of processes that the job may get, one for each number of nodes."""
        low, _, high = self.nodes.partition("-")
        return [self.tasks_per_node * nodes for nodes in range(int(low), int(high or low) + 1)]


class Profile(Resources):
    """A cluster: the resources of its jobs, and what differs for the jobs of some stages."""

    node_local: tuple[UserPath, ...] = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))  # folders local to each node
    stages: dict[Text, Settings] = Field(default_factory=dict)  # by stage, or by stage/network
    encode: Settings = Settings()  # what differs for `gowide encode --cluster`, for example the partition

    def resources(self, instance: Instance) -> Resources:
        """The resources of an instance's job: the profile's, then its stage's, then its own; mappings are merged.

        Raises RecipeError if they contradict each other.
        """
        overrides = [self.stages[name] for name in (instance.stage_name, instance.key) if name in self.stages]
        return self._merged(overrides, f"stage {instance.key}")

    def jobs(self, instances: Iterable[Instance]) -> list[list[Instance]]:
        """The instances by job: those of a stage that have the same resources are one, unless `together` is false."""
        jobs: dict[tuple[str, ...], list[Instance]] = {}
        for instance in instances:
            resources = self.resources(instance)
            apart = () if resources.together else (instance.network_name,)
            jobs.setdefault((instance.stage_name, resources.model_dump_json(), *apart), []).append(instance)
        return [*jobs.values()]

    def encode_resources(self) -> Resources:
        """The resources of `gowide encode`: one task with the CPUs of all tasks of a node and no GPU, then `encode`.

        Raises RecipeError if they contradict each other.
        """
        num_cpus = self.tasks_per_node * self.cpus_per_task
        one_task = Settings(nodes="1", gpus_per_node=0, processes_per_node=1, cpus_per_task=num_cpus)
        return self._merged([one_task, self.encode], "encode")

    def _merged(self, overrides: Sequence[Settings], job: str) -> Resources:
        values = {name: getattr(self, name) for name in Resources.model_fields}
        for settings in overrides:
            for name in settings.model_fields_set:
                value = getattr(settings, name)
                values[name] = {**values[name], **value} if isinstance(value, dict) else value
        return validate(Resources, values, f"cluster profile, {job}")


def load_profile(path: Path) -> Profile:
    """The checked profile in a YAML file. Raises RecipeError: one line with file, key and fault."""
    return validate(Profile, read_yaml(path), str(path))
