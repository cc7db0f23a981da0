"""The report of runs: the table for the terminal, one HTML page without any outside link, CSV and PNG files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from gowide_dist.errors import RunError, is_full
from gowide_dist.files import write_atomically
from gowide_dist.insight import compare, plots, results
from gowide_dist.insight.measured import measure
from gowide_dist.insight.results import View, view
from gowide_dist.insight.text import duration, rendered
from gowide_dist.run import Run

PAGE_HEAD = (*results.HEAD, "time")


def report(runs: Sequence[Run], *, measured: bool = True, out: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Write the report of a run, or of several beside each other; it for the terminal, and as data.

    measured: measure what is missing of the finished networks. out: a folder; by default the (first) run's report/.
    Raises UserError if something is no run, or the folder cannot be written.
    """
    runs = list({run.path.resolve(): run for run in runs}.values())
    views = [view(run) for run in runs]
    folder = out or runs[0].report
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if len(views) > 1:
            return _several(views, folder)
        if measured:
            found = measure(runs[0], views[0].recipe)
            views = [View(runs[0], views[0].recipe, views[0].standings, found)]
        return _one(views[0], folder)
    except OSError as error:
        if is_full(error):
            raise
        raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another place with --out") from error


def write_report(run: Run) -> str:
    """Write the report of a run, measuring nothing; the table as text. Raises RunError if this is no run."""
    return report([run], measured=False)[0]


def _one(seen: View, folder: Path) -> tuple[str, dict[str, Any]]:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(results.Result._fields)
    writer.writerows(seen.rows)
    write_atomically(folder / "results.csv", text.getvalue())
    pictures = _draw_one(seen, folder)
    try:
        about = json.loads((seen.run.path / "environment.json").read_text())
    except (OSError, ValueError):
        about = None
    where = sorted({latency.where for latency in seen.measured.latency.values()})
    _render("report", folder / "report.html", {
        "seen": seen,
        "head": PAGE_HEAD,
        "rows": [_filled(row) for row in seen.rows],
        "teachers": {f"{row.stage}/{row.network}": row.teacher for row in seen.rows if row.teacher},
        "where": "; ".join(where),
        "pictures": pictures,
        "imitations": _imitations(seen),
        "time_head": results.TIME_HEAD,
        "times": [results.time_cells(key, spent) for key, spent in seen.times.items()],
        "recipe": seen.run.recipe_path.read_text(),
        "environment": about if isinstance(about, dict) else {},
    })  # fmt: skip
    return _table(seen, folder), results.as_json(seen)


def _several(views: list[View], folder: Path) -> tuple[str, dict[str, Any]]:
    groups = compare.group(views)
    write_atomically(folder / "runs.csv", compare.as_csv(groups))
    panels = {}
    for title, name in (("top-1 %", "top1"), ("points above the baseline", "minus_baseline")):
        values = {
            f"{group.name}: {key}" if len(groups) > 1 else key: found
            for group in groups
            for key, found in getattr(group, name).items()
            if group.views[0].recipe.instances[key].stage.objective != "blocks"  # far below, it would hide the rest
        }
        if values:
            panels[title] = values
    pictures = []
    if panels:
        with plots.drawing(len(panels)) as (figure, axes):
            for panel, (title, values) in zip(axes, panels.items(), strict=True):
                plots.draw_runs(panel, title, values)
            write_atomically(folder / "runs.png", plots.png(figure))
    for title, values in panels.items():
        with plots.drawing() as (figure, [panel]):
            plots.draw_runs(panel, title, values)
            pictures.append(plots.picture(figure, f"{title}: every run is a dot, a line their mean"))
    text = compare.text(groups)
    _render("runs", folder / "runs.html", {
        "groups": [(group.title, [compare.cells(row) for row in group.statistics]) for group in groups],
        "head": compare.HEAD,
        "names": [group.name for group in groups],
        "beside": compare.beside(groups),
        "differences": compare.differences(groups),
        "runs": [
            (seen.run.path, seen.recipe.seed, PAGE_HEAD, [_filled(row) for row in seen.rows], seen.notes)
            for seen in views
        ],
        "pictures": pictures,
    })  # fmt: skip
    data = {"runs": [results.as_json(seen) for seen in views], "groups": compare.as_json(groups)}
    return f"{text}\n\nmore in {folder / 'runs.html'}", data


def _draw_one(seen: View, folder: Path) -> dict[str, list[plots.Picture]]:
    """All pictures of a run: as PNG files, and by the section of the page."""
    stages = plots.by_stage(seen)
    with plots.drawing(len(stages)) as (figure, axes):
        for panel, (name, standings) in zip(axes, stages.items(), strict=True):
            plots.draw_loss(panel, name, standings)
        write_atomically(folder / "loss.png", plots.png(figure))
    found: dict[str, list[plots.Picture]] = {"loss": [], "imitation": []}
    for name, standings in stages.items():
        with plots.drawing() as (figure, [panel]):
            plots.draw_loss(panel, name, standings)
            found["loss"].append(plots.picture(figure, f"Loss of {name} over epochs"))
    for name, draw, text in (
        ("accuracy", plots.draw_accuracy, "Top-1 of all stages over epochs"),
        ("cost", plots.draw_cost, "Top-1 against MFLOPs"),
        ("time", plots.draw_times, "Where the time of every stage went"),
    ):
        with plots.drawing() as (figure, [panel]):
            draw(panel, seen)
            found[name] = [plots.picture(figure, text)]
            write_atomically(folder / f"{name}.png", plots.png(figure))
    imitations = [standing for standing in seen.standings.values() if standing.instance.stage.objective == "blocks"]
    for standing in imitations:
        with plots.drawing(rows=2, share_epochs=True) as (figure, [mse, top1]):
            plots.draw_imitation(mse, top1, standing)
            text = f"{standing.instance.key}: mean squared error of every block, and top-1, over epochs"
            found["imitation"].append(plots.picture(figure, text))
            write_atomically(folder / f"{standing.instance.key.replace('/', '-')}.png", plots.png(figure))
    return found


def _filled(row: results.Result) -> list[str]:
    """The cells of a row under PAGE_HEAD, saying what is not measured; a teacher has none to agree with."""
    nothing = {results.HEAD.index("agrees %"): "" if row.teacher is None else "not measured"}
    measured = [cell or nothing.get(index, "not measured") for index, cell in enumerate(results.cells(row))]
    return [*measured, duration(row.hours)]


def _imitations(seen: View) -> list[tuple[str, list[str], list[list[str]]]]:
    """Of every imitation: its name, the head of its table, and a row for each time that it was evaluated."""
    tables = []
    for key, standing in seen.standings.items():
        names = [f"mse_block{index + 1}" for index in range(standing.instance.architecture.num_blocks)]
        rows = [
            [f"{line['epoch']:g}", *(f"{line[name]:.4g}" for name in names), f"{line['top1']:.2f}"]
            for line in standing.lines
            if line["kind"] == "val" and {*names, "top1"} <= line.keys()
        ]
        if standing.instance.stage.objective == "blocks" and rows:
            head = ["epoch", *(f"MSE of block {index + 1}" for index in range(len(names))), "top-1 %"]
            tables.append((key, head, rows))
    return tables


def _table(seen: View, folder: Path) -> str:
    """The rows for the terminal, without columns in which there is nothing."""
    rows = [results.cells(row) for row in seen.rows]
    used = [index for index in range(len(results.HEAD)) if index < 10 or any(row[index] for row in rows)]
    count = f"{seen.run.path}: {len(rows)} of {len(seen.standings)} stages done; more in {folder}"
    table = Table(box=box.SIMPLE_HEAD)
    for index in used:
        table.add_column(results.HEAD[index], justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*(row[index] for index in used))
    return "\n".join([rendered(table, width=160), *(f"  {note}" for note in (count, *seen.notes))])


def _render(name: str, path: Path, values: Mapping[str, Any]) -> None:
    """Fill a template that lies beside this file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    write_atomically(path, environment.get_template(f"{name}.html.j2").render(values))
