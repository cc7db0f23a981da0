"""The figures of a report: PNG files, and SVG that takes the colours of the page, light or dark."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from gowide_dist.files import write_atomically
from gowide_dist.insight.results import RunResults

TEXT, GRID = "#1f2329", "#d0d7dd"  # in SVG they become the colours of the page
COLOURS = ("#3b82d0", "#e07b28", "#3fa35c", "#b95aa8", "#8c7a50", "#c8504c", "#2aa3ab", "#7a7f8a")  # on light and dark
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    # When all colours are taken, once more with dashes and open markers.
    "axes.prop_cycle": cycler(linestyle=("-", "--"), fillstyle=("full", "none")) * cycler(color=COLOURS),
    "grid.color": GRID, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.fontsize": 9, "font.size": 10, "axes.titlesize": 11, "lines.markersize": 4.5,
    "svg.hashsalt": "gowide", "text.parse_math": False,
}  # fmt: skip
LOSSES = {"labels": "cross-entropy", "blocks": "mean squared error"}  # of an objective, for an axis; others: "loss"


def figures_of_run(results: RunResults, folder: Path) -> dict[str, str]:
    """SVG by what it shows; loss.png and accuracy.png into `folder`."""
    losses = {name: partial(_losses, results, name) for name in results.recipe.stages}
    draw(*losses.values(), png=folder / "loss.png")
    return {
        "Top-1 over epochs": draw(partial(_accuracy, results), png=folder / "accuracy.png"),
        **{f"Loss of {name} over epochs": draw(panel) for name, panel in losses.items()},
    }


def _losses(results: RunResults, name: str, ax: Axes) -> None:
    """A stage's loss, for imitation of every block: lines in training, dots in validation."""
    stage = results.recipe.stages[name]
    for instance in results.recipe.instances.values():
        if instance.stage_name != name:
            continue
        labels = {"loss": instance.network_name}
        if stage.objective == "blocks":
            lines = results.metrics[instance.key]
            blocks = sorted({int(name[9:]) for line in lines for name in line if name.startswith("mse_block")})
            labels = {f"mse_block{block}": f"{instance.network_name}, block {block}" for block in blocks}
        for metric, label in labels.items():
            [line] = ax.plot(*results.curve(instance.key, "train", metric), label=label)
            dots = results.curve(instance.key, "val", metric)
            ax.plot(*dots, "o", color=line.get_color(), fillstyle=line.get_fillstyle())
    ax.set(title=name, xlabel="epoch", ylabel=LOSSES.get(stage.objective, "loss"), yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))  # plain numbers, also for less than a decade
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def _accuracy(results: RunResults, ax: Axes) -> None:
    instances = results.recipe.instances

    def start(key: str) -> int:
        """Epochs of the stages that an instance started from."""
        parent = instances[key].init
        return start(parent) + instances[parent].stage.epochs if parent else 0

    for key in instances:
        epochs, top1 = results.curve(key, "val", "top1")
        ax.plot([start(key) + epoch for epoch in epochs], top1, marker="o", label=key)
    ax.set(title="top-1 on the validation images", xlabel="epochs of the network, earlier stages included", ylabel="%")


def draw(*panels: Callable[[Axes], None], png: Path | None = None) -> str:
    """A figure of panels side by side as an SVG element, and as a PNG file."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
        for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(ax)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # epochs
            for line in [line for line in ax.lines if not len(line.get_xdata())]:
                line.remove()
            if ax.get_legend_handles_labels()[0]:
                ax.legend()
            elif not ax.lines:
                ax.text(0.5, 0.5, "no metrics yet", transform=ax.transAxes, ha="center")
        if png:
            pixels = io.BytesIO()
            figure.savefig(pixels, format="png", dpi=120, facecolor="white")
            write_atomically(png, pixels.getvalue())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue().replace(TEXT, "currentColor").replace(GRID, "var(--line)")
    return svg[svg.index("<svg") :]  # HTML takes no XML declaration
