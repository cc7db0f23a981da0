"""What a recipe will cost, before anything is spent. Imports no torch: it runs on a login node.

FLOPs here are multiply-adds counted once, as in torchvision's tables and in all our reports. A device's TFLOP/s, as its
maker states them, count the multiply and the add: a stage takes 2 x multiply-adds / (TFLOP/s x efficiency) seconds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gowide_dist.data.info import check_split, read_dataset_info
from gowide_dist.data.memory import available_memory_bytes
from gowide_dist.errors import DataError, UserError
from gowide_dist.insight.costs import (
    MacsPerImage,
    Memory,
    memory_per_process,
    training_macs,
    validation_macs,
    with_teacher,
    without_teacher,
)
from gowide_dist.insight.simulate import Cluster, Simulated, Work, longest_path, restarts, simulate
from gowide_dist.launch.profile import Device, Profile, Resources, this_machine
from gowide_dist.pipeline import Prepared, check_data, sibling
from gowide_dist.recipe import BlocksStage, Instance, KlStage, Recipe
from gowide_dist.run import Run, StageDir, fingerprint, identities

if TYPE_CHECKING:
    from gowide_dist.insight.measure import Measured

# Training and validation images and classes, by the usual name of the folder.
KNOWN = {
    "fashion-mnist": (60_000, 10_000, 10),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "imagenet": (1_281_167, 50_000, 1000),
}
JPEGS_PER_S_PER_CPU = 800.0  # of 500 px, decoded, cropped to 224 px: README, `gowide bench --only loader`
FEW_IMAGES_PER_GPU = 32  # below, GPUs idle and batch norms see few images
STORED_TOP_K = 10  # suggested where there are more than a hundred classes
NODES = (1, 2, 4, 8, 16, 32, 64)
SCALED = Profile(gpus_per_node=8, cpus_per_task=12, timeout_min=1440,
                 device=Device(name="GPU", tflops=312, efficiency=0.2, memory_gb=80))  # fmt: skip


class DataSize(NamedTuple):
    """How many images there are, and whether they are JPEGs. `source` says where the numbers are from."""

    train: int
    val: int
    classes: int
    jpegs: bool
    source: str


@dataclass(frozen=True)
class StagePlan:
    """One stage instance. FLOPs are multiply-adds; `hours` of what is left, on `num_processes` processes together."""

    stage: str
    state: str  # to do, done, done in another run, or the step that it goes on from
    epochs: int
    images: int
    steps: int
    steps_left: int
    macs: MacsPerImage
    validation_macs: float  # of all validation passes that are left
    parameters: int
    memory: Memory
    num_processes: int
    batch_per_process: int
    hours: float
    device_hours: float
    requeues: float
    parents: tuple[str, ...]

    @property
    def total_macs(self) -> float:
        """Of the whole stage's training."""
        return self.images * self.macs.total


@dataclass(frozen=True)
class Plan:
    """The stages, parents first, what was assumed, and what to think about before it is spent."""

    recipe: str
    data: DataSize
    assumptions: dict[str, str]
    stages: list[StagePlan]
    start_hours: float  # once, of a run on this machine
    longest_path: list[str]
    longest_hours: float
    warnings: list[str]
    notes: list[str]

    @property
    def hours(self) -> float:
        """One stage after the other."""
        return sum(stage.hours for stage in self.stages) + self.start_hours

    @property
    def device_hours(self) -> float:
        """Of all stages."""
        return sum(stage.device_hours for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """As data. `macs`: multiply-adds for a training image."""
        stages = [
            {
                **asdict(stage),
                "macs": stage.macs._asdict(),
                "total_macs": stage.total_macs,
                "memory": {**stage.memory._asdict(), "total": sum(stage.memory)},
                "requeues": stage.requeues if math.isfinite(stage.requeues) else None,
            }
            for stage in self.stages
        ]
        return {
            "recipe": self.recipe,
            "data": self.data._asdict(),
            "assumptions": self.assumptions,
            "stages": stages,
            "hours": self.hours,
            "start_hours": self.start_hours,
            "device_hours": self.device_hours,
            "longest_path": {"stages": self.longest_path, "hours": self.longest_hours},
            "warnings": self.warnings,
            "notes": self.notes,
        }


def data_size(recipe: Recipe, images: int | None = None, classes: int | None = None) -> DataSize:
    """Of the encoded data; of what is given; or of a dataset that is known by its folder's name.

    Raises DataError if none of them says it.
    """
    data = recipe.data
    known = KNOWN.get(data.train.parent.name)
    try:
        info = read_dataset_info(data.train)
        train, val = (check_split(path).samples for path in (data.train, data.val))
        found = DataSize(train, val, len(info.classes), bool(info.encoding.get("jpg_share")), f"{data.train.parent}")
    except DataError as error:
        jpegs = data.augment.crop is not None
        classes = classes or data.classes or (known and known[2])
        if classes is None or (images is None and known is None):
            raise DataError(f"{error}; or tell the plan how large it will be with --images N --classes K") from None
        if known is None:
            return DataSize(images or 0, 0, classes, jpegs, "--images; without validation")
        train, val, _ = known
        found = DataSize(train, val, classes, jpegs, f"{data.train.parent.name} as it is known; it is not encoded yet")
    if images:
        found = found._replace(train=images, source=f"--images; else {found.source}")
    return found._replace(classes=classes or found.classes)


def plan(
    recipe: Recipe,
    runs: Path,
    *,
    profile: Profile | None = None,
    num_processes: int = 1,
    images: int | None = None,
    classes: int | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Plan a recipe on a cluster, or without a profile in `num_processes` processes on this machine.

    images and classes: of the data, where it is not encoded yet. Raises UserError if recipe, data and profile do not
    fit, writes nothing.
    """
    size = data_size(recipe, images, classes)
    if size.train < recipe.batch_size:
        raise DataError(f"batch_size: {recipe.batch_size} is more than the {size.train:,} training images")
    progress = _progress(recipe, runs) if images is None else {}
    here = _this_machine(num_processes)
    stages = []
    warnings: list[str] = []
    stored = {_stream(recipe.instances[key]) for key, state in progress.items() if isinstance(state, str)}
    for instance in recipe.instances.values():
        if isinstance(instance.stage, KlStage) and instance.stage.teacher_logits == "stored":
            stream = _stream(instance)
            instance = without_teacher(instance) if stream in stored else with_teacher(instance)
            stored.add(stream)
        resources = profile.resources(instance) if profile else here
        device = _device(resources, profile is not None)
        stage = _plan_stage(instance, recipe, size, resources, device, progress.get(instance.key), measured)
        stages.append(stage)
        if stage.steps_left:
            validation_s = _validation_seconds(instance, recipe, size, stage, device, measured)
            warnings += _warnings(stage, recipe, size, resources, device, validation_s, is_here=profile is None)
    parents = {stage.stage: stage.parents for stage in stages}
    path, hours = longest_path({stage.stage: stage.hours for stage in stages}, parents)
    return Plan(
        recipe.name,
        size,
        _assumptions(recipe, size, profile, here, measured),
        stages,
        measured.start_seconds / 3600 if measured else 0.0,
        path,
        hours,
        warnings,
        _stored_logits(recipe, stages, size, profile, here),
    )


def _this_machine(num_processes: int) -> Resources:
    """The cores of this machine, shared by the processes; no time limit."""
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // num_processes)
    memory = available_memory_bytes() / num_processes / 1e9
    return Resources(
        processes_per_node=num_processes,
        cpus_per_task=threads,
        timeout_min=10**9,
        device=this_machine(threads, memory_gb=memory).model_copy(update={"start_s": 0.0}),
    )


def _device(resources: Resources, is_cluster: bool) -> Device:
    """What a process computes with. Raises UserError if a profile with GPUs does not say it."""
    if resources.device:
        return resources.device
    if is_cluster and resources.gpus_per_node:
        raise UserError(
            "the cluster profile does not say how fast its GPUs are; "
            "add for example device: {name: H100, tflops: 400, efficiency: 0.3, memory_gb: 80}"
        )
    memory = resources.mem_gb / resources.tasks_per_node if resources.mem_gb else None
    return this_machine(resources.cpus_per_task, memory_gb=memory)


def _progress(recipe: Recipe, runs: Path) -> dict[str, str | int]:
    """Of stages of this recipe that have begun: where they are done, or the step of their newest checkpoint."""
    try:
        checked, checksums = check_data(recipe)
    except DataError:
        return {}
    run = Run(runs / recipe.name)
    prepared = Prepared(checked, run, recipe.instances, identities(checked, checksums))
    found: dict[str, str | int] = {}
    for key, instance in recipe.instances.items():
        mine = fingerprint(prepared.identities[key])
        if run.stage(key).is_done(mine):
            found[key] = "done"
        elif there := sibling(instance, prepared):
            found[key] = f"done in {there.path.parents[2]}"
        elif step := _saved_step(run.stage(key), mine):
            found[key] = step
    return found


def _saved_step(place: StageDir, mine: str) -> int:
    """The step of the newest checkpoint of this very training, else 0."""
    for about in sorted(place.checkpoints.glob("step-*.json"), reverse=True):
        try:
            said = json.loads(about.read_text())
            return int(said["step"]) if said["fingerprint"] == mine else 0
        except (OSError, ValueError, KeyError):
            continue
    return 0


def _plan_stage(
    instance: Instance,
    recipe: Recipe,
    size: DataSize,
    resources: Resources,
    device: Device,
    progress: str | int | None,
    measured: Measured | None,
) -> StagePlan:
    num_processes = resources.num_processes[0]
    recipe.check_processes(num_processes)
    share = recipe.batch_size // num_processes
    epochs = instance.stage.epochs
    steps = size.train // recipe.batch_size * epochs
    is_done = isinstance(progress, str)
    left = 0 if is_done else steps - (progress if isinstance(progress, int) else 0)
    evaluations = (
        0 if is_done else math.ceil((epochs // recipe.eval_every_epochs or 1) * (left / steps if steps else 1))
    )
    macs = training_macs(instance, recipe, size.classes)
    one_pass = size.val * validation_macs(instance, recipe, size.classes)
    if measured and not is_done:
        seconds = _measured_seconds(instance, recipe, size, num_processes, left, evaluations, measured)
    else:
        images = left * recipe.batch_size
        seconds = _seconds(images, macs.total, size, resources, device) + _seconds(
            evaluations * size.val, one_pass / max(1, size.val), size, resources, device
        )
    start = 0.0 if is_done or measured else device.start_s
    timeout = 60 * resources.timeout_min
    again = 0.0 if is_done else restarts(start + seconds, timeout, resources.signal_delay_s + device.start_s)
    hours = (start + seconds + (again and again * device.start_s)) / 3600
    return StagePlan(
        stage=instance.key,
        state=progress if isinstance(progress, str) else f"from step {progress:,}" if progress else "to do",
        epochs=epochs,
        images=steps * recipe.batch_size,
        steps=steps,
        steps_left=left,
        macs=macs,
        validation_macs=evaluations * one_pass,
        parameters=instance.architecture.num_parameters(size.classes),
        memory=memory_per_process(instance, recipe, size.classes, share, resources.cpus_per_task),
        num_processes=num_processes,
        batch_per_process=share,
        hours=hours,
        device_hours=hours * num_processes,
        requeues=again,
        parents=recipe.instances[instance.key].parents,
    )


def _seconds(images: float, macs: float, size: DataSize, resources: Resources, device: Device) -> float:
    """To run the processes' networks over so many images at so many multiply-adds each.

    GPUs compute while CPUs decode; on CPUs the two add up.
    """
    num_processes = resources.num_processes[0]
    computing = images * 2 * macs / (num_processes * device.flops)
    decoding = images / (num_processes * resources.cpus_per_task * _decoded_per_s(size, device))
    return max(computing, decoding) if resources.gpus_per_node else computing + decoding


def _decoded_per_s(size: DataSize, device: Device) -> float:
    """Images a second and CPU. Raw images cost next to nothing."""
    return device.images_per_s_per_cpu or (JPEGS_PER_S_PER_CPU if size.jpegs else math.inf)


def _measured_seconds(
    instance: Instance,
    recipe: Recipe,
    size: DataSize,
    num_processes: int,
    steps: int,
    evaluations: int,
    measured: Measured,
) -> float:
    """What `done.json` will say: training, validation passes, checkpoints, and what comes once."""
    if not instance.stage.epochs:
        return 0.0
    timing = measured.timing(instance, recipe)
    step = timing.step
    if instance.stage.ramp:  # measured at full size
        plain = instance._replace(stage=instance.stage.model_copy(update={"ramp": None}))
        step *= training_macs(instance, recipe, size.classes).total / training_macs(plain, recipe, size.classes).total
    share = recipe.batch_size // num_processes
    batches = math.ceil(math.ceil(size.val / num_processes) / share)
    seconds = timing.fixed + steps * step + evaluations * batches * timing.validation
    every = recipe.checkpoints
    saves = seconds // (60 * every.every_minutes) if every.every_minutes else 0
    saves += steps // every.every_steps if every.every_steps else 0
    return seconds + saves * timing.save


def _validation_seconds(
    instance: Instance, recipe: Recipe, size: DataSize, stage: StagePlan, device: Device, measured: Measured | None
) -> float:
    """Of one validation pass."""
    if measured:
        batches = math.ceil(size.val / recipe.batch_size)
        return batches * measured.timing(instance, recipe).validation
    macs = size.val * validation_macs(instance, recipe, size.classes)
    return 2 * macs / (stage.num_processes * device.flops)


def _warnings(
    stage: StagePlan,
    recipe: Recipe,
    size: DataSize,
    resources: Resources,
    device: Device,
    validation_s: float,
    *,
    is_here: bool,
) -> list[str]:
    found = []
    memory, on_gpu = stage.memory, bool(resources.gpus_per_node)
    if on_gpu and stage.batch_per_process < FEW_IMAGES_PER_GPU:
        found.append(
            f"{stage.stage}: {recipe.batch_size} images on {stage.num_processes} GPUs are {stage.batch_per_process} "
            f"each, fewer than {FEW_IMAGES_PER_GPU}: they idle, and batch norms see few images; take fewer GPUs or a "
            "larger batch"
        )
    needed = memory.device if on_gpu else sum(memory)
    if device.memory_gb and needed > device.memory_gb * 1e9:
        fixed = needed - memory.activations
        parts = math.ceil(memory.activations / max(1.0, device.memory_gb * 1e9 - fixed))
        teacher = f", {_gb(memory.teacher)} of it the teacher's" if memory.teacher else ""
        mend = (
            f"stages.{stage.stage.partition('/')[0]}.optim.accumulate={parts} would do"
            if fixed < device.memory_gb * 1e9
            else "even one image at a time does not fit: take a smaller network or other devices"
        )
        found.append(
            f"{stage.stage}: needs about {_gb(needed)} a process{teacher}, but {device.name} has "
            f"{device.memory_gb:,.0f} GB; {mend}"
        )
    eats = device.flops / (2 * stage.macs.total)
    gives = resources.cpus_per_task * _decoded_per_s(size, device)
    if on_gpu and eats > gives:
        found.append(
            f"{stage.stage}: a GPU could take {eats:,.0f} images/s, its {resources.cpus_per_task} CPUs decode "
            f"{gives:,.0f}: it will wait for data; ask for more cpus_per_task or encode smaller images (--max-side-px)"
        )
    if is_here:
        return found
    every = recipe.checkpoints
    if stage.requeues:
        unsaved = every.every_steps is None and (
            every.every_minutes is None or every.every_minutes > resources.timeout_min
        )
        if unsaved:
            found.append(
                f"{stage.stage}: takes {stage.hours:,.1f} hours, longer than timeout_min ({resources.timeout_min}), "
                "without checkpoints in between: a node that fails loses all of it; set checkpoints.every_minutes"
            )
        if math.isinf(stage.requeues):
            found.append(f"{stage.stage}: timeout_min is hardly longer than it takes to start: it will never end")
    if validation_s > resources.signal_delay_s:
        found.append(
            f"{stage.stage}: a validation pass takes {validation_s:,.0f} s, longer than signal_delay_s "
            f"({resources.signal_delay_s}): a time limit in it loses what is not saved; raise signal_delay_s"
        )
    return found


def _stored_logits(
    recipe: Recipe, stages: Sequence[StagePlan], size: DataSize, profile: Profile | None, here: Resources
) -> list[str]:
    """Where several students ask one teacher about the same stream: what storing its answers would save."""
    groups: dict[tuple[Any, ...], list[StagePlan]] = {}
    for planned in stages:
        if isinstance(recipe.instances[planned.stage].stage, KlStage) and planned.epochs:
            groups.setdefault(_stream(recipe.instances[planned.stage]), []).append(planned)
    found = []
    for students in groups.values():
        instance = recipe.instances[students[0].stage]
        stage = instance.stage
        assert isinstance(stage, KlStage)
        resources = profile.resources(instance) if profile else here
        device = _device(resources, profile is not None)
        macs = training_macs(with_teacher(instance), recipe, size.classes)
        images, count = students[0].images, len(students)
        once = images * 2 * macs.teacher / device.flops / 3600
        top_k = stage.top_k or (STORED_TOP_K if stage.teacher_logits == "live" and size.classes > 100 else None)
        row = 2 * (top_k + 1) + (2 if size.classes <= 2**15 else 4) * top_k if top_k else 2 * size.classes
        kept = f"{top_k} best" if top_k else f"all {size.classes}"
        rows = f"{stage.epochs} epochs x {images // stage.epochs:,} images x {row} bytes"
        file = f"{_gb(images * row)} ({rows}, {kept} classes)"
        names = ", ".join(student.stage for student in students)
        if stage.teacher_logits == "stored":
            found.append(
                f"{names}: {instance.teacher}'s answers are stored once, {file}; "
                f"that saves {(count - 1) * once:,.3g} of {count * once:,.3g} device hours"
            )
        else:
            saved = f"{(count - 1) * once:,.3g} of {count * once:,.3g} device hours" if count > 1 else "nothing yet"
            found.append(
                f"{names}: {macs.teacher / macs.total:.0%} of a step is {instance.teacher}'s answers; "
                f"teacher_logits: stored would save {saved}, {once:,.3g} for each further student or seed of the same "
                f"stream, for {file}"
            )
    return found


def _stream(instance: Instance) -> tuple[Any, ...]:
    """Equal for stages that ask one teacher about the same images, and keep as much of its answers."""
    stage = instance.stage
    kept = (stage.top_k, stage.temperature if stage.top_k else None) if isinstance(stage, KlStage) else ()
    return (stage.objective, instance.teacher, instance.data_seed, stage.epochs, stage.ramp, *kept)


def _assumptions(
    recipe: Recipe, size: DataSize, profile: Profile | None, here: Resources, measured: Measured | None
) -> dict[str, str]:
    resources = profile or here
    device = _device(resources, profile is not None)
    data = f"{size.train:,} training and {size.val:,} validation images in {size.classes} classes ({size.source})"
    lines = {"data": data, "FLOPs": "multiply-adds counted once; backward = 2 x forward; a device's TFLOP/s count both"}
    if measured:
        lines["time"] = f"measured here just now, in {here.tasks_per_node} processes; start of the run included once"
    else:
        whence = "cluster profile" if profile and profile.device else "assumed; small networks reach less"
        lines["time"] = (
            f"{device.name}: {device.tflops:g} TFLOP/s x {device.efficiency:g} reached = {device.flops / 1e12:.3g} "
            f"TFLOP/s a process ({whence}); validation passes included"
        )
        if math.isfinite(_decoded_per_s(size, device)):
            lines["data loading"] = f"{_decoded_per_s(size, device):,.0f} images/s and CPU"
        if profile:
            lines["jobs"] = (
                f"{device.start_s:g} s to start; limit {profile.timeout_min / 60:g} hours; a job that meets it saves, "
                "is queued again and goes on; waiting in the queue is not counted"
            )
    size_of = "4" if recipe.precision == "float32" else "2"
    lines["memory"] = (
        f"4 bytes a weight, gradient, momentum and average; activations {size_of} bytes x 2 x outputs of the "
        "convolutions x images at a time; teacher's weights and largest outputs; loader's batches; 0.5 GB of libraries"
    )
    return lines


def scale(recipe: Recipe, size: DataSize, profile: Profile | None = None) -> tuple[dict[str, str], list[Simulated]]:
    """The chain simulated on 1 to 64 nodes of the profile's kind (default: 8 GPUs), and what was assumed."""
    profile = profile or SCALED
    device = _device(profile, is_cluster=True)
    cluster = cluster_of(profile, device, size, recipe)
    work = {key: work_of(instance, recipe, size) for key, instance in recipe.instances.items()}
    most = recipe.batch_size // cluster.devices_per_node
    rows = [simulate(work, cluster, nodes, recipe.batch_size) for nodes in NODES if nodes <= most]
    if not rows:
        raise UserError(
            f"batch_size: {recipe.batch_size} images are fewer than the {cluster.devices_per_node} devices of a node"
        )
    every = cluster.checkpoint_every_s
    assumptions = {
        "data": f"{size.train:,} training and {size.val:,} validation images ({size.source})",
        "batch": f"{recipe.batch_size} images on all devices together"
        + (f", so that {rows[-1].num_nodes} nodes are the most" if rows[-1].num_nodes < NODES[-1] else ""),
        "device": f"{device.name}, {device.tflops:g} TFLOP/s x {device.efficiency:g} reached, whatever its batch",
        "node": f"{cluster.devices_per_node} devices; decodes "
        + (f"{cluster.images_s_per_node:,.0f} images/s" if math.isfinite(cluster.images_s_per_node) else "fast enough"),
        "gradients": "4 bytes a trained parameter; one ring, 2 (n - 1) / n x bytes / slowest link",
        "links": f"{device.within_node_gb_s:g} GB/s in a node, {device.between_nodes_gb_s:g} GB/s between nodes",
        "overlap": f"{device.overlap:.0%} of the ring's time at most, no longer than the backward pass",
        "checkpoints": f"every {every / 60:,.0f} minutes, {device.write_gb_s:g} GB/s, training waits",
        "restarts": f"every {cluster.timeout_s / 3600:g} hours; each loses half a checkpoint interval and "
        f"{device.start_s:g} s",
        "jobs": "each on all the nodes of its row; independent ones at the same time; no waiting in the queue",
    }
    return assumptions, rows


def cluster_of(profile: Resources, device: Device, size: DataSize, recipe: Recipe) -> Cluster:
    """The profile's nodes as the simulation takes them."""
    every = recipe.checkpoints.every_minutes
    timeout_s = 60.0 * profile.timeout_min
    return Cluster(
        devices_per_node=profile.tasks_per_node,
        device_flops=device.flops,
        within_node_bytes_s=1e9 * device.within_node_gb_s,
        between_nodes_bytes_s=1e9 * device.between_nodes_gb_s,
        overlap=device.overlap,
        images_s_per_node=_decoded_per_s(size, device) * profile.cpus_per_task * profile.tasks_per_node,
        write_bytes_s=1e9 * device.write_gb_s,
        start_s=device.start_s,
        timeout_s=timeout_s,
        checkpoint_every_s=60 * every if every else timeout_s,
    )


def work_of(instance: Instance, recipe: Recipe, size: DataSize) -> Work:
    """A stage as the simulation takes it. Bottom-up imitation averages the gradients of one block at a time."""
    macs = training_macs(instance, recipe, size.classes)
    epochs = instance.stage.epochs
    images = size.train // recipe.batch_size * recipe.batch_size * epochs
    parameters = instance.architecture.num_parameters(size.classes)
    trained = parameters
    if isinstance(instance.stage, BlocksStage) and instance.stage.order == "bottom-up":
        trained //= instance.architecture.num_blocks
    evaluations = epochs // recipe.eval_every_epochs or 1
    return Work(
        images=images,
        student_flops=2 * macs.student,
        teacher_flops=2 * macs.teacher,
        validation_flops=2.0 * evaluations * size.val * validation_macs(instance, recipe, size.classes),
        gradient_bytes=4 * trained,
        checkpoint_bytes=8 * parameters,
        parents=instance.parents,
    )


def scale_table(assumptions: dict[str, str], rows: Sequence[Simulated]) -> str:
    """The simulation as lines of text."""
    lines = [("nodes", "batch/device", "hours", "device hours", "efficiency", "bound by", "")]
    for row in rows:
        note = f"fewer than {FEW_IMAGES_PER_GPU} images a device" if row.batch_per_device < FEW_IMAGES_PER_GPU else ""
        lines.append(
            (
                str(row.num_nodes), f"{row.batch_per_device:g}", _hours(row.hours), _hours(row.device_hours),
                f"{row.efficiency:.0%}", row.bound, note,
            )
        )  # fmt: skip
    return f"assumed, not measured\n{_listed(assumptions)}\n\n{_columns(lines, left=(5, 6))}"


def table(plan: Plan) -> str:
    """The plan as lines of text."""
    head = ("stage", "state", "epochs", "steps", "forward", "backward", "teacher", "TFLOPs", "parameters", "GB/process",
            "processes", "batch", "hours", "device hours", "requeues")  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for stage in plan.stages:
        flops = (f"{macs / 1e6:,.3f}".rstrip("0").rstrip(".") for macs in stage.macs)
        lines.append(
            (
                stage.stage, stage.state, str(stage.epochs), f"{stage.steps:,}", *flops,
                f"{stage.total_macs / 1e12:,.2f}", f"{stage.parameters:,}", f"{sum(stage.memory) / 1e9:.2f}",
                str(stage.num_processes), str(stage.batch_per_process), _hours(stage.hours),
                _hours(stage.device_hours), f"{stage.requeues:g}",
            )
        )  # fmt: skip
    text = f"{plan.recipe}: forward, backward and teacher in MFLOPs for a training image; hours of what is left\n"
    text += f"{_columns(lines, left=(0, 1))}\n\n"
    text += f"one after the other: {_hours(plan.hours)} hours; all stages: {_hours(plan.device_hours)} device hours\n"
    text += f"longest path: {_hours(plan.longest_hours)} hours, {' -> '.join(plan.longest_path)}\n"
    text += _listed(plan.assumptions)
    text += "".join(f"\nwarning: {line}" for line in plan.warnings)
    return text + "".join(f"\nnote: {line}" for line in plan.notes)


def _listed(values: dict[str, str]) -> str:
    width = max(map(len, values))
    return "\n".join(f"  {name:{width}}  {value}" for name, value in values.items())


def _columns(lines: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> str:
    """Lines of cells, those of columns `left` to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.3g}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
