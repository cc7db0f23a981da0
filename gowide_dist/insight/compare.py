"""Several runs: those of one recipe that differ in their seed are one experiment, with a mean and a spread."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, NamedTuple

from gowide_dist.errors import RunError
from gowide_dist.insight.results import View
from gowide_dist.run import flat

BASELINE = "baseline"  # the stage that the others are compared with
WITHOUT_EFFECT = {"name", "log_every_steps", "eval_every_epochs", "checkpoints"}  # on the weights


class Spread(NamedTuple):
    """Of n values; sd: the standard deviation (n - 1), None for one value."""

    n: int
    mean: float
    sd: float | None
    min: float
    max: float

    def text(self, sign: str = "") -> str:
        """As mean ± sd."""
        return f"{self.mean:{sign}.2f}" + (f" ± {self.sd:.2f}" if self.sd is not None else "")


def spread(values: list[float]) -> Spread | None:
    """Nothing of no values."""
    if not values:
        return None
    return Spread(len(values), fmean(values), stdev(values) if len(values) > 1 else None, min(values), max(values))


class Statistic(NamedTuple):
    """A stage instance over the runs of a group. top1: over networks that were trained apart, in %.

    minus_baseline: in points, over the runs that have both at equal student epochs, within each run.
    """

    stage: str
    network: str
    student_epochs: int
    top1: Spread
    minus_baseline: Spread | None


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds."""

    name: str  # what its column is called
    views: list[View]

    @property
    def seeds(self) -> str:
        """As text."""
        return ", ".join(str(view.recipe.seed) for view in self.views)

    @property
    def title(self) -> str:
        """The runs and their seeds."""
        return f"{', '.join(str(view.run.path) for view in self.views)} (seeds {self.seeds})"

    @cached_property
    def top1(self) -> dict[str, list[float]]:
        """By instance, of each network that was trained apart: one that runs share counts once."""
        found: dict[str, dict[str, float]] = {}
        for view in self.views:
            for key, standing in view.standings.items():
                if standing.done:
                    found.setdefault(key, {})[standing.done.model_sha256] = standing.done.top1
        return {key: list(values.values()) for key, values in found.items()}

    @cached_property
    def minus_baseline(self) -> dict[str, list[float]]:
        """By instance, its top-1 less the baseline's of the same run, network and student epochs."""
        found: dict[str, list[float]] = {}
        for view in self.views:
            rows = {(row.stage, row.network): row for row in view.rows}
            for (stage, network), row in rows.items():
                plain = rows.get((BASELINE, network))
                if plain and stage != BASELINE and plain.student_epochs == row.student_epochs:
                    found.setdefault(f"{stage}/{network}", []).append(row.top1 - plain.top1)
        return found

    @cached_property
    def statistics(self) -> list[Statistic]:
        """One for each instance that a run has finished."""
        rows = {f"{row.stage}/{row.network}": row for view in self.views for row in view.rows}
        found = []
        for key in self.views[0].recipe.instances:
            if top1 := spread(self.top1.get(key, [])):
                row = rows[key]
                difference = spread(self.minus_baseline.get(key, []))
                found.append(Statistic(row.stage, row.network, row.student_epochs, top1, difference))
        return found


def group(views: list[View]) -> list[Group]:
    """The runs sorted into experiments. Raises RunError if two are the same recipe with the same seed."""
    found: dict[str, list[View]] = {}
    for view in views:
        recipe = view.recipe.model_dump(mode="json", exclude={*WITHOUT_EFFECT, "seed"})
        found.setdefault(json.dumps(recipe, sort_keys=True), []).append(view)
    for same in found.values():
        for index, view in enumerate(same):
            for other in same[:index]:
                if other.recipe.seed == view.recipe.seed:
                    raise RunError(
                        f"{other.run.path} and {view.run.path}: the same recipe and seed, whose results would count "
                        "twice; name one of them"
                    )
    names = Counter(same[0].recipe.name for same in found.values())
    paths = {key: same[0].run.path.absolute() for key, same in found.items()}
    common = os.path.commonpath(paths.values())
    groups = []
    for key, same in found.items():
        name = same[0].recipe.name
        groups.append(Group(name if names[name] == 1 else str(paths[key].relative_to(common)), same))
    return groups


def differences(groups: list[Group]) -> dict[str, list[str]]:
    """What the groups' recipes differ in, by dotted path: the value of each group."""
    dumps = [flat(group.views[0].recipe.model_dump(mode="json", exclude={*WITHOUT_EFFECT, "seed"})) for group in groups]
    names = dict.fromkeys(name for dump in dumps for name in dump)
    found = {name: [dump.get(name, "absent") for dump in dumps] for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


HEAD = (
    "stage", "network", "student epochs", "n", "top-1 %, mean ± sd", "min", "max", "minus baseline, mean ± sd", "n",
    "min", "max",
)  # fmt: skip


def cells(row: Statistic) -> tuple[str, ...]:
    """A row as people read it, under HEAD."""
    top1, minus = row.top1, row.minus_baseline
    shown = (minus.text("+"), str(minus.n), f"{minus.min:+.2f}", f"{minus.max:+.2f}") if minus else ("",) * 4
    head = (row.stage, row.network, str(row.student_epochs))
    return (*head, str(top1.n), top1.text(), f"{top1.min:.2f}", f"{top1.max:.2f}", *shown)


def beside(groups: list[Group]) -> list[tuple[str, ...]]:
    """Of every instance that one of the groups has: its top-1 in each group."""
    found = [{f"{row.stage}/{row.network}": row for row in group.statistics} for group in groups]
    keys = dict.fromkeys(key for rows in found for key in rows)
    return [(key, *(f"{rows[key].top1.text()} (n={rows[key].top1.n})" if key in rows else "" for rows in found))
            for key in keys]  # fmt: skip


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table that can be pasted into a README."""
    lines = [head, tuple("-" * len(name) for name in head), *rows]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    lines[1] = tuple("-" * width for width in widths)
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def text(groups: list[Group]) -> str:
    """All groups for the terminal."""
    parts = [f"{group.title}\n\n{markdown(HEAD, [cells(row) for row in group.statistics])}" for group in groups]
    if len(groups) > 1:
        names = tuple(group.name for group in groups)
        parts.append(markdown(("top-1 %", *names), beside(groups)))
        parts.append(markdown(("what differs", *names), [(name, *of) for name, of in differences(groups).items()]))
    return "\n\n".join(parts)


def as_csv(groups: list[Group]) -> str:
    """A line for each instance of each group."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    spreads = [f"{name}_{field}" for name in ("top1", "minus_baseline") for field in Spread._fields]
    writer.writerow(["recipe", "seeds", "stage", "network", "student_epochs", *spreads])
    for group in groups:
        for row in group.statistics:
            numbers = [*row.top1, *(row.minus_baseline or [None] * len(Spread._fields))]
            rounded = [round(value, 4) if isinstance(value, float) else value for value in numbers]
            writer.writerow([group.name, group.seeds, row.stage, row.network, row.student_epochs, *rounded])
    return buffer.getvalue()


def as_json(groups: list[Group]) -> list[dict[str, Any]]:
    """The groups as data."""
    return [
        {
            "runs": [str(view.run.path) for view in group.views],
            "seeds": [view.recipe.seed for view in group.views],
            "statistics": [
                {
                    **row._asdict(),
                    "top1": row.top1._asdict(),
                    "minus_baseline": row.minus_baseline and row.minus_baseline._asdict(),
                }
                for row in group.statistics
            ],
        }
        for group in groups
    ]
