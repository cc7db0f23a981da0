"""Results of runs: a row for each finished stage instance, and statistics over runs of several seeds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from gowide_dist.errors import RunError
from gowide_dist.instances import Instance
from gowide_dist.networks.architecture import Structure
from gowide_dist.recipe import Recipe
from gowide_dist.run import Done, Run, flat, read_metrics

BASELINE = "baseline"  # the stage that the others are compared with
WITHOUT_EFFECT = {"name", "log_every_steps", "eval_every_epochs", "checkpoints"}  # on the weights
MEASURED_FILE = "measured.json"  # in the run's report/
Row = dict[str, Any]  # of a table


def read_measured(run: Run) -> dict[str, Row]:
    """What was measured of finished networks, by the SHA-256 of their weights. Empty if the file is damaged.

    latency_ms_1, latency_ms_64: of a forward pass in PyTorch, normalised float32 images to logits; where: machine,
    device, threads. dead_channels: of every block, how many channels of its output are zero for all validation images:
    as a ReLU that outputs zero passes no gradient on, hardly any of them comes back. agreement: % of the validation
    images in the same class, by the teacher's SHA-256. error: why something is missing.
    """
    try:
        measured: dict[str, Row] = json.loads((run.report / MEASURED_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return measured


@dataclass(frozen=True)
class RunResults:
    """A run as a report reads it; by instance what is done, what was measured, and the lines of its metrics.jsonl."""

    run: Run
    recipe: Recipe
    done: dict[str, Done]
    measured: dict[str, Row]
    metrics: dict[str, list[dict[str, Any]]]

    @property
    def settings(self) -> dict[str, str]:
        """All that the weights depend on but the seed, by dotted key."""
        return flat(self.recipe.model_dump(mode="json", exclude={*WITHOUT_EFFECT, "seed"}))

    def curve(self, key: str, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a metric; `kind`: train or val."""
        lines = [line for line in self.metrics[key] if line["kind"] == kind and name in line]
        return [line["epoch"] for line in lines], [line[name] for line in lines]

    def as_json(self) -> dict[str, Any]:
        measured = self.measured.items()
        return {
            "run": str(self.run.path),
            "seed": self.recipe.seed,
            "results": list(self.rows.values()),
            "unfinished": {key: self._progress(key) for key in self.recipe.instances if key not in self.done},
            "not_measured": {key: values["error"] for key, values in measured if "error" in values},
            "dead_channels": {key: values["dead_channels"] for key, values in measured if "dead_channels" in values},
        }

    def notes(self) -> list[str]:
        """Which instances are unfinished, could not be or are not yet measured, or have dead channels."""
        data = self.as_json()
        notes = [f"{key}: {progress}" for key, progress in data["unfinished"].items()]
        notes += [f"{key}: not measured: {error}" for key, error in data["not_measured"].items()]
        if not all(self.measured.values()):
            notes.append(f"`gowide report {self.run.path}` measures latency and agreement")
        for key, counts in data["dead_channels"].items():
            settings = self.recipe.instances[key].architecture
            # of a network that is rounded, none are counted
            channels = settings.block_channels if counts and isinstance(settings, Structure) else ()
            blocks = enumerate(zip(counts, channels, strict=True), 1)
            if dead := [f"{count} of {total} channels of block {i}" for i, (count, total) in blocks if count]:
                notes.append(f"{key}: {', '.join(dead)} are zero for all validation images")
        return notes

    def _progress(self, key: str) -> str:
        if not self.metrics[key]:
            return "not started, or no metrics yet"
        _, accuracies = self.curve(key, "val", "top1")
        last = f", top-1 {accuracies[-1]:.2f} % when last evaluated" if accuracies else ""
        return f"epoch {self.metrics[key][-1]['epoch']:.2f} of {self.recipe.instances[key].stage.epochs}{last}"

    @property
    def num_classes(self) -> int:
        num_classes = self.recipe.data.classes
        assert num_classes is not None, "a run's recipe is resolved"
        return num_classes

    @cached_property
    def rows(self) -> dict[str, Row]:
        """A row of results.csv for each finished instance, parents first."""
        from gowide_dist.train.costs import network_cost, spent

        num_classes = self.num_classes
        rows = {}
        for key, done in self.done.items():
            instance, measured = self.recipe.instances[key], self.measured[key]
            network = network_cost(instance.architecture, num_classes, self.recipe.data.resolution)
            cost = spent(key, self.recipe, num_classes, done.images // done.epochs if done.epochs else 0)
            teacher = teacher_of(instance, self.recipe)
            sha256 = self.done[teacher].model_sha256 if teacher in self.done else ""
            rows[key] = {
                **done.model_dump(include={"stage", "network", "epochs", "top1", "balanced_top1", "top5", "seconds"}),
                "parameters": network.parameters,
                "mflops": network.macs / 1e6,  # multiply-adds of one image, in millions
                "student_epochs": cost.epochs,  # with the stages that it started from
                "images": cost.images,  # seen in these
                "train_tflops": cost.macs / 1e12,  # multiply-adds spent in these, the teacher's forward passes included
                "hours": done.seconds / 3600,
                "teacher": teacher,  # whose predictions `agreement` compares with
                "agreement": measured.get("agreement", {}).get(sha256),
                "latency_ms_1": measured.get("latency_ms_1"),
                "latency_ms_64": measured.get("latency_ms_64"),
            }
        return rows


def teacher_of(instance: Instance, recipe: Recipe) -> str | None:
    """The teacher of this instance or of what it started from; without one, the recipe's only teacher."""
    if instance.teacher or instance.init:
        return instance.teacher or teacher_of(recipe.instances[instance.init or ""], recipe)
    teachers = {other.teacher for other in recipe.instances.values() if other.teacher}
    return teachers.pop() if len(teachers) == 1 and instance.key not in teachers else None


def read_results(run: Run, *, measure: bool = False) -> RunResults:
    """Read a run, finished or not, and measure what is missing. Raises RunError if it is not a run, or damaged."""
    recipe = run.recipe()
    done = run.finished(recipe)
    # A folder that is done, but not for this recipe, holds the metrics of another.
    current = [key for key in recipe.instances if key in done or run.stage(key).done is None]
    metrics = {key: read_metrics(run.stage(key).metrics) if key in current else [] for key in recipe.instances}
    if measure:
        from gowide_dist.insight.latency import measure_networks

        known = measure_networks(run, recipe)
    else:
        known = read_measured(run)
    measured = {key: known.get(each.model_sha256, {}) for key, each in done.items()}
    return RunResults(run, recipe, done, measured, metrics)


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Statistics of n values; sd: the standard deviation (n - 1), None for one value. None without any."""
    if not values:
        return None
    sd = stdev(values) if len(values) > 1 else None
    return {"n": len(values), "mean": fmean(values), "sd": sd, "min": min(values), "max": max(values), "values": values}


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds. name: the recipe's or, where that is not unique, a run's path."""

    name: str
    runs: list[RunResults]

    @property
    def seeds(self) -> str:
        """Those of the runs that have finished a stage: no other has a part in the statistics."""
        return ", ".join(str(run.recipe.seed) for run in self.runs if run.done) or "none yet"

    @cached_property
    def statistics(self) -> dict[str, Row]:
        """Of each instance that a run has finished.

        top1, balanced_top1: the spread in %, over the networks that were trained: one that several runs share counts
        once. balanced_top1 is None where it is top1, because the classes have equally many images, or was not noted.
        minus_baseline: in points, over the runs that have both at equal student epochs; None if there is none.
        """
        statistics = {}
        for key in self.runs[0].recipe.instances:
            finished = [run for run in self.runs if key in run.done]
            if not finished:
                continue
            row = {name: finished[0].rows[key][name] for name in ("stage", "network", "student_epochs")}
            baseline = f"{BASELINE}/{row['network']}"
            pairs = [(run.rows[key], run.rows[baseline]) for run in finished if key != baseline in run.done]
            minus = [a["top1"] - b["top1"] for a, b in pairs if a["student_epochs"] == b["student_epochs"]]
            networks = {run.done[key].model_sha256: run.done[key] for run in finished}.values()
            top1 = [done.top1 for done in networks]
            balanced = [done.balanced_top1 for done in networks if done.balanced_top1 is not None]
            statistics[key] = {
                **row,
                "top1": spread(top1),
                "balanced_top1": None if balanced == top1 else spread(balanced),
                "minus_baseline": spread(minus),
            }
        return statistics

    def as_json(self) -> dict[str, Any]:
        runs, seeds = [str(run.run.path) for run in self.runs], [run.recipe.seed for run in self.runs]
        return {"runs": runs, "seeds": seeds, "statistics": list(self.statistics.values())}


def group_runs(runs: Sequence[RunResults]) -> list[Group]:
    """The runs by recipe. Raises RunError if two have the same recipe and the same seed."""
    groups: dict[str, dict[int, RunResults]] = {}
    for run in runs:
        seeds = groups.setdefault(json.dumps(run.settings), {})
        if other := seeds.get(run.recipe.seed):
            raise RunError(f"{other.run.path} and {run.run.path}: same recipe and seed; pass only one of them")
        seeds[run.recipe.seed] = run
    members = [list(seeds.values()) for seeds in groups.values()]
    count = Counter(runs[0].recipe.name for runs in members)
    names = [first.recipe.name if count[first.recipe.name] == 1 else str(first.run.path) for first, *_ in members]
    return list(map(Group, names, members))
