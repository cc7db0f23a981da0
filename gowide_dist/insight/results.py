"""What runs have come to: a row for each finished stage instance, and statistics over runs of several seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
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
        from gowide_dist.insight.costs import spent

        num_classes = self.recipe.data.classes
        assert num_classes is not None, "a run's recipe is resolved"
        cost = spent(instance.key, self.recipe, num_classes, done.images // done.epochs if done.epochs else 0)
        teacher = teacher_of(instance, self.recipe)
        latency = self.measurements.latency.get(done.model_sha256)
        return Result(
            **done.model_dump(include={"stage", "network", "epochs", "top1", "top5", "seconds"}),
            parameters=instance.architecture.num_parameters(num_classes),
            mflops=instance.architecture.macs(num_classes, self.recipe.data.resolution) / 1e6,
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


SPREAD = ("n", "mean", "sd", "min", "max")


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """n, mean, sd (with n - 1; None for one value), min and max of values, and these; None for an empty list."""
    if not values:
        return None
    sd = stdev(values) if len(values) > 1 else None
    numbers = (len(values), fmean(values), sd, min(values), max(values))
    return {**dict(zip(SPREAD, numbers, strict=True)), "values": list(values)}


def statistics(runs: Sequence[RunResults]) -> dict[str, dict[str, Any]]:
    """For each instance that one of the runs has finished: stage, network, student epochs, and the spread of its

    top1: in %, over the networks that were trained: one that several runs share counts once;
    minus_baseline: in points, over the runs that have both at equal student epochs, within each.
    """
    rows = {}
    for key in runs[0].recipe.instances:
        finished = [run for run in runs if key in run.done]
        if not finished:
            continue
        stage, network, epochs = (
            getattr(finished[0].rows[key], name) for name in ("stage", "network", "student_epochs")
        )
        top1 = {run.done[key].model_sha256: run.done[key].top1 for run in finished}
        baseline = f"{BASELINE}/{network}"
        differences = [
            run.done[key].top1 - run.done[baseline].top1
            for run in finished
            if baseline in run.done and key != baseline and run.rows[baseline].student_epochs == epochs
        ]
        rows[key] = {
            "stage": stage, "network": network, "student_epochs": epochs,
            "top1": spread(list(top1.values())), "minus_baseline": spread(differences),
        }  # fmt: skip
    return rows


def group_runs(runs: Sequence[RunResults]) -> dict[str, list[RunResults]]:
    """The runs by recipe, under its name or, where that is not unique, their path.

    Raises RunError if two runs have the same recipe and the same seed.
    """
    by_recipe: dict[str, dict[int, RunResults]] = {}
    for run in runs:
        seeds = by_recipe.setdefault(json.dumps(run.settings), {})
        if other := seeds.get(run.recipe.seed):
            raise RunError(
                f"{other.run.path} and {run.run.path}: the same recipe and seed, whose results would count twice; "
                "name one of them"
            )
        seeds[run.recipe.seed] = run
    groups = [list(seeds.values()) for seeds in by_recipe.values()]
    names = [group[0].recipe.name for group in groups]
    paths = [group[0].run.path.absolute() for group in groups]
    common = os.path.commonpath(paths)
    return {
        name if names.count(name) == 1 else str(path.relative_to(common)): group
        for name, path, group in zip(names, paths, groups, strict=True)
    }
