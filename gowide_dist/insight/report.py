"""The report of runs: tables for the terminal, one HTML page without any outside link, CSV and PNG files."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gowide_dist.files import write_atomically, writing_to
from gowide_dist.insight.results import Group, Row, RunResults, group_runs, read_results
from gowide_dist.insight.text import table, used_columns
from gowide_dist.run import Run, top5_is_telling

COLUMNS = {  # of results.csv; those of a run's table with their title and format
    "stage": ("stage", ""), "network": ("network", ""), "parameters": ("parameters", ","), "mflops": ("MFLOPs", ",.3f"),
    "epochs": ("epochs", ""), "top1": ("top-1 %", ".2f"), "balanced_top1": ("balanced %", ".2f"),
    "top5": ("top-5 %", ".2f"), "seconds": ("seconds", ",.0f"),
    "student_epochs": ("student epochs", ""), "images": None, "train_tflops": ("train TFLOPs", ",.2f"), "hours": None,
    "teacher": None, "agreement": ("agreement %", ".2f"), "latency_ms_1": ("ms at 1", ",.2f"),
    "latency_ms_64": ("ms at 64", ",.1f"),
}  # fmt: skip
SHOWN = {name: column for name, column in COLUMNS.items() if column}
GROUP_KEY = ("stage", "network", "student_epochs")
RANGE = ("n", "min", "max")
GROUP_HEAD = (
    "stage", "network", "student epochs", "top-1 %, mean ± sd", *RANGE, "balanced %, mean ± sd",
    "minus baseline, mean ± sd", *RANGE,
)  # fmt: skip
SPREADS = [
    (name, key) for name in ("top1", "minus_baseline", "balanced_top1") for key in ("n", "mean", "sd", "min", "max")
]
GROUPS_CSV = ["recipe", "seeds", *GROUP_KEY, *(f"{name}_{key}" for name, key in SPREADS)]
CAPTION = (
    "Epochs and seconds are of the stage alone; student epochs and train TFLOPs include the stages that it started "
    "from and the teacher's forward passes. FLOPs are multiply-adds."
)
CAPTIONS = {  # of columns that not every table has
    "balanced_top1": "Balanced: mean of the classes' top-1, which have unequally many validation images.",
    "agreement": "Agreement: fraction of validation images for which network and teacher predict the same class.",
    "latency_ms_1": "Latency: median of batches of 1 and 64, PyTorch float32;",
}
CURVES_CAPTION = (
    "Lines: training images, dots: validation. Imitation does not train the classifier: with `classifier: fresh` its "
    "top-1 is near chance."
)
GROUPS_CAPTION = (
    "n: networks that were trained; one that several runs share counts once. sd: standard deviation, with n - 1. "
    "Minus baseline: difference in top-1 (percentage points) within each run, at equal student epochs."
)


@dataclass(frozen=True)
class Section:
    """A part of the page. The terminal shows its table as well."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()  # above the table
    figures: Mapping[str, str] = field(default_factory=dict)  # SVG, by what it shows
    caption: str = ""


def report(runs: Sequence[Run], *, measure: bool = True, out: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Write the report of a run, or of several side by side. Returns it as text for the terminal, and as data.

    measure: measure what is missing of the finished networks of a single run. out: a folder; by default report/ of the
    first run. Raises UserError if something is not a run, or the folder cannot be written.
    """
    unique = list({run.path.resolve(): run for run in runs}.values())
    results = [read_results(run, measure=measure and len(unique) == 1) for run in unique]
    groups = group_runs(results)
    folder = out or runs[0].report
    with writing_to(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        return _report_groups(groups, folder) if len(results) > 1 else _report_run(results[0], folder)


def _report_run(results: RunResults, folder: Path) -> tuple[str, dict[str, Any]]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that cannot be written
    from gowide_dist.insight.plots import figures_of_run

    columns = sorted(COLUMNS, key=lambda name: name == "balanced_top1")  # the newest last: the others keep their places
    _write_csv(folder / "results.csv", columns, results.rows.values())
    section = _run_section(results)
    curves = Section("Curves", figures=figures_of_run(results, folder), caption=CURVES_CAPTION)
    _write_page(folder / "report.html", results.recipe.name, [section, curves])
    notes = [f"  {line}" for line in (*section.lines, f"more in {folder}")]
    return "\n".join([table(section.head, section.rows, left=(0, 1)), "", *notes]), results.as_json()


def _report_groups(groups: list[Group], folder: Path) -> tuple[str, dict[str, Any]]:
    csv_rows = [
        {"recipe": group.name, "seeds": group.seeds}
        | {name: row[name] for name in GROUP_KEY}
        | {f"{name}_{key}": row[name][key] for name, key in SPREADS if row[name]}
        for group in groups
        for row in group.statistics.values()
    ]
    _write_csv(folder / "runs.csv", GROUPS_CSV, csv_rows)
    sections = [_group_section(group) for group in groups]
    if len(groups) > 1:
        sections.append(_differences(groups))
    text = [f"{section.title}\n\n{table(section.head, section.rows, markdown=True)}" for section in sections]
    runs = [run for group in groups for run in group.runs]
    sections += [_run_section(run) for run in runs]
    _write_page(folder / "runs.html", ", ".join(group.name for group in groups), sections)
    data = {"runs": [run.as_json() for run in runs], "groups": [group.as_json() for group in groups]}
    return "\n\n".join([*text, f"more in {folder / 'runs.html'}"]), data


def _run_section(results: RunResults) -> Section:
    rows, explained = [], set()
    for row in results.rows.values():
        if row["balanced_top1"] == row["top1"]:  # so it is where the classes have equally many images
            row = {**row, "balanced_top1": None}
        if not top5_is_telling(results.num_classes):
            row = {**row, "top5": None}
        explained |= {name for name in CAPTIONS if row[name] is not None}
        rows.append(["" if row[name] is None else format(row[name], spec) for name, (_, spec) in SHOWN.items()])
    progress = f"{results.run.path}: {len(rows)} of {len(results.recipe.instances)} stages done"
    places = sorted({measured["where"] for measured in results.measured.values() if "where" in measured})
    title, head = f"{results.run.path}, seed {results.recipe.seed}", [title for title, _ in SHOWN.values()]
    caption = [CAPTION, *(text for name, text in CAPTIONS.items() if name in explained), "; ".join(places)]
    return Section(title, head, rows, [progress, *results.notes()], caption=" ".join(caption).rstrip())


def _group_section(group: Group) -> Section:
    def cells(spread: dict[str, Any] | None, sign: str = "") -> list[str]:
        """Mean ± sd, n, min, max."""
        if spread is None:
            return [""] * 4
        sd = "" if spread["sd"] is None else f" ± {spread['sd']:.2f}"
        numbers = (f"{spread[name]:{sign}.2f}" for name in ("min", "max"))
        return [f"{spread['mean']:{sign}.2f}{sd}", str(spread["n"]), *numbers]

    rows = [
        [
            *(str(row[name]) for name in GROUP_KEY),
            *cells(row["top1"]),
            cells(row["balanced_top1"])[0],
            *cells(row["minus_baseline"], "+"),
        ]
        for row in group.statistics.values()
    ]
    title = f"{', '.join(str(run.run.path) for run in group.runs)} (seeds {group.seeds})"
    return Section(title, GROUP_HEAD, rows, caption=GROUPS_CAPTION)


def _differences(groups: list[Group]) -> Section:
    """The settings in which the groups' recipes differ."""
    settings = [group.runs[0].settings for group in groups]
    names = dict.fromkeys(name for values in settings for name in values)
    rows = [[name, *(values.get(name, "absent") for values in settings)] for name in names]
    differences = [row for row in rows if len(set(row[1:])) > 1]
    return Section("Differences between the recipes", ["setting", *(group.name for group in groups)], differences)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def _write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    from jinja2 import StrictUndefined, Template

    text = Path(__file__).with_name("report.html.j2").read_text()
    template = Template(text, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    write_atomically(path, template.render(title=title, sections=sections, used_columns=used_columns))
