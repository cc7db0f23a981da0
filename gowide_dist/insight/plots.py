"""The pictures of a report, drawn once: as PNG files, and as SVG in the page, in a light and a dark dress."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gowide_dist.insight.results import TIME_HEAD, Standing, View
from gowide_dist.recipe import KlStage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE = "#1f2329", "#d0d7dd"  # in the page's dark dress: DARK
DARK = {INK: "#e6edf3", PALE: "#30363e"}
COLOURS = ("#3b82d0", "#e07b28", "#3fa35c", "#b95aa8", "#8c7a50", "#c8504c", "#2aa3ab", "#7a7f8a")
SIZE = (5.2, 3.6)  # inches
LOSSES = {"labels": "cross-entropy", "blocks": "mean squared error", "kl": "KL divergence"}
MIXED = "KL divergence and cross-entropy"


class Picture(NamedTuple):
    """A picture as it stands in a page: data: addresses of its two dresses."""

    text: str  # for who cannot see it
    light: str
    dark: str


@contextmanager
def drawing(columns: int = 1, rows: int = 1, *, share_epochs: bool = False) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with panels, in our style."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        "grid.color": PALE, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.fontsize": 9, "font.size": 10, "axes.titlesize": 11, "svg.hashsalt": "gowide",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * (1 + 0.5 * (rows - 1))), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False, sharex=share_epochs).flat)


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    return buffer.getvalue()


def picture(figure: Figure, text: str) -> Picture:
    """The figure for the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    light = buffer.getvalue().decode()
    dark = light
    for colour, other in DARK.items():
        dark = dark.replace(colour, other)
    return Picture(text, _address(light), _address(dark))


def _address(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def by_stage(view: View) -> dict[str, list[Standing]]:
    """The instances of each stage."""
    found = groupby(view.standings.values(), key=lambda standing: standing.instance.stage_name)
    return {name: list(group) for name, group in found}


def draw_loss(axes: Axes, name: str, standings: list[Standing]) -> None:
    """A stage's loss over epochs, imitation with a curve per block: lines in training, dots in validation."""
    stage = standings[0].instance.stage
    is_mixed = isinstance(stage, KlStage) and stage.labels_weight > 0
    axes.set(title=name, xlabel="epoch", ylabel=MIXED if is_mixed else LOSSES[stage.objective])
    colours = iter(COLOURS * 8)
    for standing in standings:
        for loss in _losses(standing):
            label = standing.instance.network_name + loss.removeprefix("loss").replace("mse_block", ", block ")
            _curve(axes, standing, loss, label, next(colours))
    _finish(axes)
    _logarithmic(axes)


def draw_imitation(mse: Axes, top1: Axes, standing: Standing) -> None:
    """The error of every block of the student on its own, and below it the accuracy that it has at that moment."""
    mse.set(title=standing.instance.key, ylabel="MSE per block")
    for index, loss in enumerate(_losses(standing)):
        _curve(mse, standing, loss, f"block {index + 1}", COLOURS[index % len(COLOURS)])
    _finish(mse)
    _logarithmic(mse)
    epochs, accuracies = standing.curve("val", "top1")
    top1.plot(epochs, accuracies, "o-", color=INK, markersize=4)
    top1.set(xlabel="epoch", ylabel="top-1 %", ylim=(0, 100))


def draw_accuracy(axes: Axes, view: View) -> None:
    """Validation accuracy over student epochs: a stage goes on where the one that it started from ends."""
    from matplotlib.ticker import MaxNLocator

    axes.set(
        title="top-1 on the validation images", xlabel="epochs of the network, earlier stages included", ylabel="%"
    )
    for dress, standing in zip(_dresses(), view.standings.values(), strict=False):
        start, instance = 0, standing.instance
        while instance.init:
            instance = view.recipe.instances[instance.init]
            start += instance.stage.epochs
        epochs, accuracies = standing.curve("val", "top1")
        if epochs:
            shifted = [start + epoch for epoch in epochs]
            axes.plot(shifted, accuracies, marker="o", markersize=4, label=standing.instance.key, **dress)
    _finish(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_cost(axes: Axes, view: View) -> None:
    """Accuracy of the finished networks against the multiply-adds of one image; teachers are squares."""
    axes.set(title="accuracy against cost", xlabel="MFLOPs of one image", ylabel="top-1 %")
    teachers = {standing.instance.teacher for standing in view.standings.values()}
    for dress, row in zip(_dresses(), view.rows, strict=False):
        key = f"{row.stage}/{row.network}"
        dress["linestyle"] = ""
        axes.plot(row.mflops, row.top1, marker="s" if key in teachers else "o", markersize=8, label=key, **dress)
    _finish(axes)
    axes.margins(x=0.2, y=0.15)
    _logarithmic(axes, "x")


def draw_times(axes: Axes, view: View) -> None:
    """Where the time of each stage went."""
    keys, left = list(view.times), [0.0] * len(view.times)
    for part, (label, colour) in enumerate(zip(TIME_HEAD[1:-1], COLOURS, strict=False)):
        widths = [(spent[part] or 0.0) / 60 for spent in view.times.values()]
        if any(widths):
            axes.barh(keys, widths, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(title="where the time went", xlabel="minutes")
    if axes.patches:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="small")


def draw_runs(axes: Axes, title: str, values: dict[str, list[float]]) -> None:
    """Every run's value as a dot, and a line at their mean."""
    for index, (colour, found) in enumerate(zip(COLOURS * 8, values.values(), strict=False)):
        axes.plot([index] * len(found), found, "o", color=colour, alpha=0.7, markersize=7)
        if found:
            axes.hlines(sum(found) / len(found), index - 0.25, index + 0.25, color=colour, linewidth=2)
    axes.set(title=title, xlim=(-0.6, len(values) - 0.4))
    axes.set_xticks(range(len(values)), list(values), rotation=25, ha="right")


def _losses(standing: Standing) -> list[str]:
    if standing.instance.stage.objective != "blocks":
        return ["loss"]
    return [f"mse_block{index + 1}" for index in range(standing.instance.architecture.num_blocks)]


def _curve(axes: Axes, standing: Standing, name: str, label: str, colour: str) -> None:
    """Training as a line, validation as dots of the same colour."""
    train, val = standing.curve("train", name), standing.curve("val", name)
    if train[0]:
        axes.plot(*train, color=colour, linewidth=1.3, label=label)
    if val[0]:
        axes.plot(*val, "o", color=colour, markersize=4, label=None if train[0] else label)


def _dresses() -> Iterator[dict[str, Any]]:
    """How lines are told apart: by colour; when these are used up, by being dashed with open dots as well."""
    for round_ in count():
        for colour in COLOURS:
            more = {"markerfacecolor": "none", "linestyle": "--"} if round_ % 2 else {"linestyle": "-"}
            yield {"color": colour, **more}


def _logarithmic(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis with plain numbers on it, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if axes.lines:
        axes.set(**{f"{which}scale": "log"})
        axis, (low, high) = (axes.xaxis, axes.get_xlim()) if which == "x" else (axes.yaxis, axes.get_ylim())
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if high / low < 4:
            axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        else:
            axis.set_minor_formatter("")


def _finish(axes: Axes) -> None:
    if axes.lines:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "nothing measured yet", transform=axes.transAxes, ha="center")
