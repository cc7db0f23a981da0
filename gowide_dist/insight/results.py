"""What runs have come to: a row for each finished stage instance, and statistics over runs of several seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, NamedTuple

from gowide_dist.errors import RunError
from gowide_dist.insight.latency import Measurements, read_measurements, teacher_of
from gowide_dist.recipe import Instance, Recipe, load_recipe
from gowide_dist.run import Done, Run, flat, read_metrics

BASELINE = "baseline"  # the stage that the others are compared with
WITHOUT_EFFECT = {"name", "log_every_steps", "eval_every_epochs", "checkpoints"}  # on the weights


class Result(NamedTuple):
    """A row of results.csv: a finished stage instance. Accuracies in %."""

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
    train_tflops: float  # multiply-adds spent in these, the teacher's forward passes included, in 10^12
    hours: float
    teacher: str | None  # the instance whose predictions `agreement` compares with
    agreement: float | None  # % of the validation images that both put in the same class; None: not measured
    latency_ms_1: float | None  # of a batch of 1
    latency_ms_64: float | None


@dataclass(frozen=True)
class RunResults:
    """A run as a report reads it; by instance what is done, and the whole lines of its metrics.jsonl."""

    run: Run
    recipe: Recipe
    done: dict[str, Done]
    metrics: dict[str, list[dict[str, Any]]]
    measurements: Measurements

    @cached_property
    def rows(self) -> dict[str, Result]:
        """A row for each finished instance, in the recipe's order."""
        return {key: self._row(self.recipe.instances[key], done) for key, done in self.done.items()}

    @cached_property
    def dead_channels(self) -> dict[str, list[int]]:
        counts = self.measurements.dead_channels
        return {key: counts[done.model_sha256] for key, done in self.done.items() if done.model_sha256 in counts}

    @cached_property
    def unfinished(self) -> dict[str, str]:
        """How far each of the other instances is, in words."""
        return {key: self._progress(key) for key in self.recipe.instances if key not in self.done}

    @property
    def notes(self) -> list[str]:
        """Which instances are unfinished, could not be measured, or have dead channels."""
        notes = [f"{key}: {progress}" for key, progress in self.unfinished.items()]
        notes += [f"{key}: not measured: {error}" for key, error in self.measurements.errors.items()]
        for key, counts in self.dead_channels.items():
            channels = self.recipe.instances[key].architecture.block_channels
            dead = [f"{n} of {channels[i]} channels of block {i + 1}" for i, n in enumerate(counts) if n]
            if dead:
                notes.append(f"{key}: {', '.join(dead)} are zero for all validation images")
        return notes

    @property
    def settings(self) -> dict[str, str]:
        """All that the weights depend on but the seed, by dotted path."""
        return flat(self.recipe.model_dump(mode="json", exclude={*WITHOUT_EFFECT, "seed"}))

    def curve(self, key: str, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a metric; `kind`: train or val."""
        points = [(line["epoch"], line[name]) for line in self.metrics[key] if line["kind"] == kind and name in line]
        return [epoch for epoch, _ in points], [value for _, value in points]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run.path),
            "seed": self.recipe.seed,
            "results": [row._asdict() for row in self.rows.values()],
            "unfinished": self.unfinished,
            "not_measured": self.measurements.errors,
            "dead_channels": self.dead_channels,
        }

    def _progress(self, key: str) -> str:
        if not self.metrics[key]:
            return "not begun, or nothing measured yet"
        _, accuracies = self.curve(key, "val", "top1")
        last = f", top-1 {accuracies[-1]:.2f} % when last evaluated" if accuracies else ""
        return f"epoch {self.metrics[key][-1]['epoch']:.2f} of {self.recipe.instances[key].stage.epochs}{last}"

    def _row(self, instance: Instance, done: Done) -> Result:
        from gowide_dist.insight.costs import network_cost, spent

        num_classes = self.recipe.data.classes
        assert num_classes is not None, "a run's recipe is resolved"
        cost = spent(instance.key, self.recipe, num_classes, done.images // done.epochs if done.epochs else 0)
        teacher = teacher_of(instance, self.recipe)
        network = network_cost(instance.architecture, num_classes, self.recipe.data.resolution)
        latency = self.measurements.latency.get(done.model_sha256)
        return Result(
            **done.model_dump(include={"stage", "network", "epochs", "top1", "top5", "seconds"}),
            parameters=network.parameters,
            mflops=network.macs / 1e6,
            student_epochs=cost.epochs,
            images=cost.images,
            train_tflops=cost.macs / 1e12,
            hours=done.seconds / 3600,
            teacher=teacher,
            agreement=self.measurements.agreement_of(done, self.done[teacher]) if teacher in self.done else None,
            latency_ms_1=latency.batch_1_ms if latency else None,
            latency_ms_64=latency.batch_64_ms if latency else None,
        )


def read_results(run: Run) -> RunResults:
    """Read a run, finished or not. Raises RunError if it is none, or damaged."""
    if not run.recipe_path.exists():
        raise RunError(f"{run.path}: no run directory, it has no {run.recipe_path.name}")
    recipe = load_recipe(run.recipe_path)
    done = run.finished(recipe)
    metrics = {}
    for key in recipe.instances:
        stage_dir = run.stage(key)
        is_of_another_recipe = stage_dir.done is not None and key not in done
        lines = [] if is_of_another_recipe else read_metrics(stage_dir.metrics)
        metrics[key] = [line for line in lines if "epoch" in line]
    return RunResults(run, recipe, done, metrics, read_measurements(run))


@dataclass(frozen=True)
class Spread:
    """Of n values; sd: the standard deviation (n - 1), None for one value."""

    n: int
    mean: float
    sd: float | None
    min: float
    max: float
    values: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        """None for an empty list."""
        sd = stdev(values) if len(values) > 1 else None
        return cls(len(values), fmean(values), sd, min(values), max(values), values) if values else None

    def text(self, sign: str = "") -> str:
        return f"{self.mean:{sign}.2f}" + (f" ± {self.sd:.2f}" if self.sd is not None else "")


@dataclass(frozen=True)
class Statistic:
    """A stage instance over the runs of a group.

    top1: in %, of each network that was trained: one that several runs share counts once. minus_baseline: in points,
    within each run that has both at equal student epochs.
    """

    stage: str
    network: str
    student_epochs: int
    top1: Spread
    minus_baseline: Spread | None


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds. name: the recipe's or, where that is not unique, the run's path."""

    name: str
    runs: list[RunResults]

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.recipe.seed) for run in self.runs)

    @cached_property
    def statistics(self) -> dict[str, Statistic]:
        """Of each instance that a run has finished."""
        statistics = {}
        for key in self.runs[0].recipe.instances:
            finished = [run for run in self.runs if key in run.done]
            top1 = Spread.of(list({run.done[key].model_sha256: run.done[key].top1 for run in finished}.values()))
            if top1 is None:
                continue
            row = finished[0].rows[key]
            baseline = f"{BASELINE}/{row.network}"
            pairs = [
                (run.rows[key], run.rows[baseline]) for run in finished if baseline in run.done and key != baseline
            ]
            minus = [one.top1 - plain.top1 for one, plain in pairs if one.student_epochs == plain.student_epochs]
            statistics[key] = Statistic(row.stage, row.network, row.student_epochs, top1, Spread.of(minus))
        return statistics

    def as_json(self) -> dict[str, Any]:
        return {
            "runs": [str(run.run.path) for run in self.runs],
            "seeds": [run.recipe.seed for run in self.runs],
            "statistics": [asdict(row) for row in self.statistics.values()],
        }


def group_runs(runs: Sequence[RunResults]) -> list[Group]:
    """The runs by recipe. Raises RunError if two have the same recipe and the same seed."""
    by_recipe: dict[str, dict[int, RunResults]] = {}
    for run in runs:
        seeds = by_recipe.setdefault(json.dumps(run.settings), {})
        if other := seeds.get(run.recipe.seed):
            raise RunError(
                f"{other.run.path} and {run.run.path}: the same recipe and seed, whose results would count twice; "
                "name one of them"
            )
        seeds[run.recipe.seed] = run
    members = [list(seeds.values()) for seeds in by_recipe.values()]
    names = [runs[0].recipe.name for runs in members]
    paths = [runs[0].run.path.absolute() for runs in members]
    common = os.path.commonpath(paths)
    return [
        Group(name if names.count(name) == 1 else str(path.relative_to(common)), runs)
        for name, path, runs in zip(names, paths, members, strict=True)
    ]
