"""The report of runs: tables for the terminal, one HTML page without any outside link, CSV and PNG files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gowide_dist.files import write_atomically, writing_to
from gowide_dist.insight.latency import measure_networks
from gowide_dist.insight.results import Group, Result, RunResults, Spread, group_runs, read_results
from gowide_dist.insight.text import table, used_columns
from gowide_dist.run import Run

COLUMNS = {  # of a run's table: the field of a Result, and its format
    "stage": ("stage", ""), "network": ("network", ""), "parameters": ("parameters", ","), "MFLOPs": ("mflops", ",.3f"),
    "epochs": ("epochs", ""), "top-1 %": ("top1", ".2f"), "top-5 %": ("top5", ".2f"), "seconds": ("seconds", ",.0f"),
    "student epochs": ("student_epochs", ""), "train TFLOPs": ("train_tflops", ",.2f"),
    "agrees %": ("agreement", ".2f"), "ms at 1": ("latency_ms_1", ",.2f"), "ms at 64": ("latency_ms_64", ",.1f"),
}  # fmt: skip
GROUP_COLUMNS = (
    "stage", "network", "student epochs", "top-1 %, mean ± sd", "n", "min", "max", "minus baseline, mean ± sd", "n",
    "min", "max",
)  # fmt: skip
SPREAD = ("n", "mean", "sd", "min", "max")
GROUPS_CSV = (
    "recipe", "seeds", "stage", "network", "student_epochs",
    *(f"top1_{name}" for name in SPREAD), *(f"minus_baseline_{name}" for name in SPREAD),
)  # fmt: skip
RUN_CAPTION = (
    "Epochs and seconds are of the stage alone; student epochs and train TFLOPs include the stages that it started "
    "from and the teacher's forward passes. FLOPs are multiply-adds."
)
CURVES_CAPTION = (
    "Lines: training images. Dots: validation images. Imitation does not train the classifier: its top-1 can be low."
)
GROUPS_CAPTION = (
    "n counts networks that were trained: one that several runs share counts once. sd: standard deviation, with n - 1. "
    "Minus baseline: points of top-1, within each run, at equal student epochs. In the figures a network is a dot."
)


@dataclass(frozen=True)
class Section:
    """A part of the page, whose table the terminal shows as well."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    left: Sequence[int] = (0, 1)  # columns of words
    lines: Sequence[str] = ()  # above the table
    figures: Mapping[str, str] = field(default_factory=dict)  # SVG, by what it shows
    code: str = ""
    caption: str = ""

    @property
    def columns(self) -> list[int]:
        return used_columns(self.head, self.rows)

    def text(self, *, markdown: bool = False) -> str:
        return table(self.head, self.rows, left=self.left, markdown=markdown)


def report(runs: Sequence[Run], *, measure: bool = True, out: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Write the report of a run, or of several side by side; it for the terminal, and as data.

    measure: measure what is missing of the finished networks of a single run. out: a folder; by default report/ of the
    first run. Raises UserError if something is no run, or the folder cannot be written.
    """
    results = [read_results(run) for run in {run.path.resolve(): run for run in runs}.values()]
    folder = out or runs[0].report
    with writing_to(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        if len(results) > 1:
            return _report_groups(group_runs(results), folder)
        [single] = results
        if measure:
            single = replace(single, measurements=measure_networks(single.run, single.recipe))
        return _report_run(single, folder)


def write_report(run: Run) -> str:
    """Write the report of a run without measuring its networks; its table as text. Raises RunError if it is no run."""
    return report([run], measure=False)[0]


def _report_run(results: RunResults, folder: Path) -> tuple[str, dict[str, Any]]:
    from gowide_dist.insight.plots import figures_of_run

    _write_csv(folder / "results.csv", Result._fields, results.rows.values())
    caption = RUN_CAPTION
    if teachers := [f"{key} with {row.teacher}" for key, row in results.rows.items() if row.agreement is not None]:
        caption += f" Agrees: part of the validation images that both put in one class: {', '.join(teachers)}."
    if places := {latency.where for latency in results.measurements.latency.values()}:
        caption += f" Latency: median of batches of 1 and 64, PyTorch float32, on {'; '.join(sorted(places))}."
    section = replace(_run_section(results), title="Results", caption=caption)
    environment = results.run.path / "environment.json"
    sections = [
        section,
        Section("Curves", figures=figures_of_run(results, folder), caption=CURVES_CAPTION),
        Section("Recipe", code=results.run.recipe_path.read_text()),
        Section("Environment of the last start", code=environment.read_text() if environment.exists() else ""),
    ]
    _write_page(folder / "report.html", results.recipe.name, sections)
    notes = [f"  {line}" for line in (*section.lines, f"more in {folder}")]
    return "\n".join([section.text(), "", *notes]), results.as_json()


def _report_groups(groups: list[Group], folder: Path) -> tuple[str, dict[str, Any]]:
    from gowide_dist.insight.plots import figures_of_groups

    rows = [
        (group.name, group.seeds, row.stage, row.network, row.student_epochs, *_numbers(row.top1, row.minus_baseline))
        for group in groups
        for row in group.statistics.values()
    ]
    _write_csv(folder / "runs.csv", GROUPS_CSV, rows)
    sections = [_group_section(group) for group in groups]
    if len(groups) > 1:
        sections += _side_by_side(groups)
    text = [f"{section.title}\n\n{section.text(markdown=True)}" for section in sections]
    runs = [run for group in groups for run in group.runs]
    sections += [
        Section("Every run", figures=figures_of_groups(groups, folder), caption=GROUPS_CAPTION),
        *(_run_section(run) for run in runs),
    ]
    _write_page(folder / "runs.html", ", ".join(group.name for group in groups), sections)
    data = {"runs": [run.as_json() for run in runs], "groups": [group.as_json() for group in groups]}
    return "\n\n".join([*text, f"more in {folder / 'runs.html'}"]), data


def _run_section(results: RunResults) -> Section:
    rows = [
        ["" if (value := getattr(row, name)) is None else format(value, spec) for name, spec in COLUMNS.values()]
        for row in results.rows.values()
    ]
    lines = [f"{results.run.path}: {len(rows)} of {len(results.recipe.instances)} stages done"]
    lines += [] if rows else ["No stage is finished yet."]
    title = f"{results.run.path}, seed {results.recipe.seed}"
    return Section(title, list(COLUMNS), rows, lines=[*lines, *results.notes])


def _group_section(group: Group) -> Section:
    def numbers(spread: Spread | None, sign: str = "") -> list[str]:
        """Mean ± sd, n, min, max."""
        if spread is None:
            return [""] * 4
        return [spread.text(sign), str(spread.n), f"{spread.min:{sign}.2f}", f"{spread.max:{sign}.2f}"]

    rows = [
        [row.stage, row.network, str(row.student_epochs), *numbers(row.top1), *numbers(row.minus_baseline, "+")]
        for row in group.statistics.values()
    ]
    title = f"{', '.join(str(run.run.path) for run in group.runs)} (seeds {group.seeds})"
    return Section(title, GROUP_COLUMNS, rows, lines=[] if rows else ["No stage is finished yet."])


def _side_by_side(groups: list[Group]) -> list[Section]:
    """Top-1 of every instance in each group, and the settings in which the groups' recipes differ."""
    names = [group.name for group in groups]
    top1 = []
    for key in dict.fromkeys(key for group in groups for key in group.statistics):
        spreads = [group.statistics[key].top1 if key in group.statistics else None for group in groups]
        top1.append([key, *(f"{spread.text()} (n={spread.n})" if spread else "" for spread in spreads)])
    settings = [group.runs[0].settings for group in groups]
    keys = dict.fromkeys(key for values in settings for key in values)
    rows = [[key, *(values.get(key, "absent") for values in settings)] for key in keys]
    differences = [row for row in rows if len(set(row[1:])) > 1]
    return [
        Section("Side by side", ["top-1 %", *names], top1, left=(0,)),
        Section("Differences between the recipes", ["setting", *names], differences, left=(0,)),
    ]


def _numbers(*spreads: Spread | None) -> list[float | None]:
    """Under the columns of runs.csv that SPREAD names, for each."""
    values = [getattr(spread, name, None) for spread in spreads for name in SPREAD]
    return [round(value, 4) if isinstance(value, float) else value for value in values]


def _write_csv(path: Path, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    write_atomically(path, text.getvalue())


def _write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(title=title, sections=sections)
    write_atomically(path, page)
