"""What a run has come to: where its stages stand, the rows of its table, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from gowide_dist.errors import RunError
from gowide_dist.insight.costs import network_cost, spent
from gowide_dist.insight.measured import Measured, read_measured, teacher_of
from gowide_dist.progress import clock
from gowide_dist.recipe import Instance, Recipe, load_recipe
from gowide_dist.run import Done, Run, read_metrics


class Result(NamedTuple):
    """A row of the table: a finished stage instance. Accuracies in %."""

    stage: str
    network: str
    parameters: int
    mflops: float  # multiply-adds of one image, in millions
    epochs: int
    top1: float
    top5: float
    seconds: float
    student_epochs: int  # with the stages that it started from
    images: int  # seen in these
    train_tflops: float  # multiply-adds spent in these, the teacher's answers included, in 10^12
    hours: float
    teacher: str | None  # the instance whose answers `agreement` compares with
    agreement: float | None  # % of the validation images that both take for the same class; None: not measured
    latency_ms_1: float | None  # of a batch of 1
    latency_ms_64: float | None


HEAD = (
    "stage", "network", "parameters", "MFLOPs", "epochs", "top-1 %", "top-5 %", "seconds", "student epochs",
    "train TFLOPs", "agrees %", "ms at 1", "ms at 64",
)  # fmt: skip


def cells(row: Result) -> tuple[str, ...]:
    """A row as people read it, under HEAD; what was not measured is empty."""
    measured = [(row.agreement, 2), (row.latency_ms_1, 2), (row.latency_ms_64, 1)]
    return (
        row.stage, row.network, f"{row.parameters:,}", f"{row.mflops:,.3f}", str(row.epochs), f"{row.top1:.2f}",
        f"{row.top5:.2f}", f"{row.seconds:,.0f}", str(row.student_epochs), f"{row.train_tflops:,.2f}",
        *("" if value is None else f"{value:,.{digits}f}" for value, digits in measured),
    )  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """Where a stage instance stands. lines: of its metrics, those that are whole."""

    instance: Instance
    done: Done | None
    lines: list[dict[str, Any]]

    def curve(self, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a metric; `kind` train or val."""
        points = [(line["epoch"], line[name]) for line in self.lines if line["kind"] == kind and name in line]
        return [epoch for epoch, _ in points], [value for _, value in points]

    @property
    def progress(self) -> str:
        """How far an unfinished stage is, in words."""
        if not self.lines:
            return "not begun, or nothing measured yet"
        _, accuracies = self.curve("val", "top1")
        last = f", top-1 {accuracies[-1]:.2f} % when last evaluated" if accuracies else ""
        return f"epoch {self.lines[-1]['epoch']:.2f} of {self.instance.stage.epochs}{last}"


TIME_HEAD = (
    "stage", "computing", "waiting for data", "communication", "validation", "checkpoints, phases", "start-up, rest",
    "in all",
)  # fmt: skip


class Times(NamedTuple):
    """Where the seconds of a stage instance went; None where its metrics do not tell."""

    compute: float  # communication included where that is None
    data: float  # waiting for it
    communication: float | None  # of gradients, that no computing hides
    validation: float | None
    between: float | None  # checkpoints, and setting up phases
    rest: float  # start-up and finishing, and what is None above
    total: float


def times(standing: Standing, batch_size: int) -> Times | None:
    """Where the time of a stage went, from its metrics; None if there are none."""
    if not any(line["kind"] == "train" for line in standing.lines):
        return None
    training = data = communication = validation = between = 0.0
    step = 0
    now: float | None = None
    for line in standing.lines:
        then, now = now, line.get("seconds")
        took = 0.0
        if line["kind"] == "train":
            took = (line["step"] - step) * batch_size / line["images_per_s"]
            training, data, step = training + took, data + took * line["data_wait"], line["step"]
            communication += took * line.get("comm_wait", 0.0)
        if then is not None and now is not None:
            gap = max(0.0, now - then - took)
            if line["kind"] == "val":
                validation += gap
            else:
                between += gap
    timed = all("seconds" in line for line in standing.lines)
    total = standing.done.seconds if standing.done else max(training, now or 0.0)
    known = training + (validation + between if timed else 0.0)
    return Times(
        training - data - communication,
        data,
        communication if all("comm_wait" in line for line in standing.lines if line["kind"] == "train") else None,
        validation if timed else None,
        between if timed else None,
        max(0.0, total - known),
        total,
    )


@dataclass(frozen=True)
class View:
    """A run as it is read for a report."""

    run: Run
    recipe: Recipe
    standings: dict[str, Standing]
    measured: Measured

    @cached_property
    def rows(self) -> list[Result]:
        """One row for each finished stage instance, in the recipe's order."""
        return [self._row(key, standing.done) for key, standing in self.standings.items() if standing.done]

    @cached_property
    def unfinished(self) -> dict[str, str]:
        """How far the other instances are."""
        return {key: standing.progress for key, standing in self.standings.items() if not standing.done}

    @cached_property
    def notes(self) -> list[str]:
        """What is to be said of single instances: not finished, not measured, channels that died."""
        found = [f"{key}: {progress}" for key, progress in self.unfinished.items()]
        found += [f"{key}: not measured: {reason}" for key, reason in self.measured.why_not.items()]
        for key, dead in self.dead_channels.items():
            channels = self.recipe.instances[key].architecture.block_channels
            lost = [f"{n} of {channels[i]} channels of block {i + 1}" for i, n in enumerate(dead) if n]
            if lost:
                found.append(f"{key}: {', '.join(lost)} are zero for all validation images")
        return found

    @cached_property
    def dead_channels(self) -> dict[str, list[int]]:
        """Of each finished instance that was asked: how many of each block's channels (see `Measured`)."""
        done = {key: standing.done.model_sha256 for key, standing in self.standings.items() if standing.done}
        known = self.measured.dead_channels
        return {key: known[model] for key, model in done.items() if model in known}

    @cached_property
    def times(self) -> dict[str, Times]:
        """Where the time of each instance went, of those that have metrics."""
        found = {key: times(standing, self.recipe.batch_size) for key, standing in self.standings.items()}
        return {key: spent_s for key, spent_s in found.items() if spent_s}

    def _row(self, key: str, done: Done) -> Result:
        instance, num_classes = self.recipe.instances[key], self.recipe.data.classes
        assert num_classes is not None, "a run's recipe is resolved"
        cost = spent(key, self.recipe, num_classes, done.images // done.epochs if done.epochs else 0)
        teacher = teacher_of(instance, self.recipe)
        network = network_cost(instance.architecture, num_classes, self.recipe.data.resolution)
        taught_by = self.standings[teacher].done if teacher else None
        latency = self.measured.latency.get(done.model_sha256)
        agreement = self.measured.agreement_of(done, taught_by) if taught_by else None
        return Result(
            instance.stage_name,
            instance.network_name,
            network.parameters,
            network.macs / 1e6,
            done.epochs,
            done.top1,
            done.top5,
            done.seconds,
            cost.epochs,
            cost.images,
            cost.macs / 1e12,
            done.seconds / 3600,
            teacher,
            agreement,
            latency.batch_1_ms if latency else None,
            latency.batch_64_ms if latency else None,
        )


def view(run: Run) -> View:
    """Read a run, finished or not. Raises RunError if this is none, or if it is damaged."""
    if not run.recipe_path.exists():
        raise RunError(f"{run.path}: no run directory, it has no {run.recipe_path.name}")
    recipe = load_recipe(run.recipe_path)
    standings = {}
    finished = run.finished(recipe)
    for key, instance in recipe.instances.items():
        place = run.stage(key)
        is_of_another = place.done is not None and key not in finished
        lines = [line for line in read_metrics(place.metrics) if "epoch" in line and not is_of_another]
        standings[key] = Standing(instance, finished.get(key), lines)
    return View(run, recipe, standings, read_measured(run))


def as_json(seen: View) -> dict[str, Any]:
    """A run's results as data. Times in seconds."""
    return {
        "run": str(seen.run.path),
        "seed": seen.recipe.seed,
        "results": [row._asdict() for row in seen.rows],
        "unfinished": seen.unfinished,
        "times": {key: spent_s._asdict() for key, spent_s in seen.times.items()},
        "not_measured": seen.measured.why_not,
        "dead_channels": seen.dead_channels,
    }


def time_cells(key: str, spent_s: Times) -> tuple[str, ...]:
    """A row of the table of times."""
    return (key, *("not measured" if part is None else clock(part) for part in spent_s))
