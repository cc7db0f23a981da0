"""The figures of a report: PNG files, and SVG that takes the colours of the page, light or dark."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from gowide_dist.files import write_atomically
from gowide_dist.insight.results import Group, RunResults
from gowide_dist.recipe import KlStage

TEXT, GRID = "#1f2329", "#d0d7dd"
PAGE_COLOURS = {TEXT: "currentColor", GRID: "var(--line)"}  # in SVG
COLOURS = ("#3b82d0", "#e07b28", "#3fa35c", "#b95aa8", "#8c7a50", "#c8504c", "#2aa3ab", "#7a7f8a")  # on light and dark
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "grid.color": GRID, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.fontsize": 9, "font.size": 10, "axes.titlesize": 11, "lines.markersize": 4.5,
    "svg.hashsalt": "gowide", "text.parse_math": False,
}  # fmt: skip
LOSSES = {"labels": "cross-entropy", "blocks": "mean squared error", "kl": "KL divergence"}
PANEL_INCHES = (5.2, 3.6)


class Series(NamedTuple):
    """Points of a panel. Those of one label have one colour, and one entry in the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o-"  # as matplotlib's `plot` takes it


class Panel(NamedTuple):
    """One plot of a figure."""

    title: str
    series: list[Series]
    xlabel: str = ""
    ylabel: str = ""
    log: Literal["x", "y", ""] = ""
    ylim: tuple[float, float] | None = None
    names: Sequence[str] = ()  # of x = 0, 1, ...; then there is no legend


def figures_of_run(results: RunResults, folder: Path) -> dict[str, str]:
    """SVG by what it shows; loss.png, accuracy.png and cost.png into `folder`."""
    instances = results.recipe.instances

    def start(key: str) -> int:
        """Epochs of the stages that an instance started from."""
        parent = instances[key].init
        return start(parent) + instances[parent].stage.epochs if parent else 0

    curves = {key: results.curve(key, "val", "top1") for key in instances}
    accuracy = [Series(key, [start(key) + epoch for epoch in epochs], top1) for key, (epochs, top1) in curves.items()]
    teachers = {instance.teacher for instance in instances.values()}
    cost = [Series(key, [row.mflops], [row.top1], "s" if key in teachers else "o") for key, row in results.rows.items()]
    stages = {name: _stage_panels(name, results) for name in results.recipe.stages}
    draw(*stages.values(), png=folder / "loss.png")
    return {
        "Top-1 over epochs": draw(
            [Panel("top-1 on the validation images", accuracy, "epochs of the network, earlier stages included", "%")],
            png=folder / "accuracy.png",
        ),
        "Top-1 against MFLOPs": draw(
            [Panel("accuracy against cost (squares: teachers)", cost, "MFLOPs of one image", "top-1 %", log="x")],
            png=folder / "cost.png",
        ),
        **{f"Loss and top-1 of {name} over epochs": draw(panels) for name, panels in stages.items()},
    }


def figures_of_groups(groups: Sequence[Group], folder: Path) -> dict[str, str]:
    """SVG by what it shows; runs.png into `folder`. Every network is a dot, the line their mean."""
    panels = []
    for title, name in (("top-1 %", "top1"), ("points above the baseline", "minus_baseline")):
        spreads = {
            f"{group.name}: {key}" if len(groups) > 1 else key: spread
            for group in groups
            for key, statistic in group.statistics.items()
            # imitation, far below the others, would hide their differences
            if group.runs[0].recipe.instances[key].stage.objective != "blocks"
            if (spread := getattr(statistic, name))
        }
        series = []
        for x, (label, spread) in enumerate(spreads.items()):
            series.append(Series(label, [x] * spread.n, spread.values, "o"))
            series.append(Series(label, [x - 0.25, x + 0.25], [spread.mean] * 2, "-"))
        if series:
            panels.append(Panel(title, series, names=list(spreads)))
    if panels:
        draw(*([panel] for panel in panels), png=folder / "runs.png")
    return {f"{panel.title}: every network, and their mean": draw([panel]) for panel in panels}


def _stage_panels(name: str, results: RunResults) -> list[Panel]:
    """A stage's loss, for imitation of every block, and below it top-1: lines in training, dots in validation."""
    stage = results.recipe.stages[name]
    instances = [instance for instance in results.recipe.instances.values() if instance.stage_name == name]
    losses = []
    for instance in instances:
        labels = {"loss": instance.network_name}
        if stage.objective == "blocks":
            blocks = range(1, instance.architecture.num_blocks + 1)
            labels = {f"mse_block{block}": f"{instance.network_name}, block {block}" for block in blocks}
        for metric, label in labels.items():
            losses.append(Series(label, *results.curve(instance.key, "train", metric), "-"))
            losses.append(Series(label, *results.curve(instance.key, "val", metric), "o"))
    top1 = [Series(instance.network_name, *results.curve(instance.key, "val", "top1")) for instance in instances]
    loss = LOSSES[stage.objective]
    if isinstance(stage, KlStage) and stage.labels_weight:
        loss += " and cross-entropy"
    return [Panel(name, losses, ylabel=loss, log="y"), Panel("", top1, "epoch", "top-1 %", ylim=(0, 100))]


def draw(*columns: Sequence[Panel], png: Path | None = None) -> str:
    """A figure as an SVG element, and as a PNG file. The panels of a column share their x axis."""
    width, height = PANEL_INCHES
    num_rows = len(columns[0])
    with rc_context(STYLE):
        figure = Figure(figsize=(width * len(columns), height * (1 + num_rows) / 2), layout="constrained")
        axes = figure.subplots(num_rows, len(columns), squeeze=False, sharex="col")
        for ax, panel in zip(axes.T.flat, chain(*columns), strict=True):
            _plot(ax, panel)
        if png:
            pixels = io.BytesIO()
            figure.savefig(pixels, format="png", dpi=120, facecolor="white")
            write_atomically(png, pixels.getvalue())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg[svg.index("<svg") :]  # HTML takes no XML declaration


def _plot(ax: Axes, panel: Panel) -> None:
    ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    shown = [series for series in panel.series if len(series.x)]
    labels: list[str] = []
    for series in shown:
        is_new = series.label not in labels
        labels += [series.label] * is_new
        index = labels.index(series.label)
        [line] = ax.plot(series.x, series.y, series.style, color=COLOURS[index % len(COLOURS)])
        line.set_label(series.label if is_new else None)
        if index // len(COLOURS) % 2:  # all colours are taken: tell them apart by open markers and dashes as well
            line.set(markerfacecolor="none", linestyle="--" if "-" in series.style else "")
    if panel.names:
        ax.set_xticks(range(len(panel.names)), panel.names, rotation=25, ha="right")
    elif shown:
        ax.legend()
    else:
        ax.text(0.5, 0.5, "nothing measured yet", transform=ax.transAxes, ha="center")
    if panel.ylim:
        ax.set_ylim(panel.ylim)
    if panel.log and shown:
        _logarithmic(ax, panel.log)


def _logarithmic(ax: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers, also where it spans less than a decade."""
    ax.set(**{f"{which}scale": "log"})
    axis, (low, high) = (ax.xaxis, ax.get_xlim()) if which == "x" else (ax.yaxis, ax.get_ylim())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0), numticks=12))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:.2g}" if high / low < 4 else "")
