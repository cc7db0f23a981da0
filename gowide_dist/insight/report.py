"""The results of a run: a table for the terminal, `results.csv`, and the loss plot."""

from __future__ import annotations

import csv
import io
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from gowide_dist.errors import RunError
from gowide_dist.insight.costs import spent
from gowide_dist.recipe import Instance, Recipe, load_recipe
from gowide_dist.run import Done, Run, read_metrics, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Result(NamedTuple):
    """A row of the table: a finished stage instance. Accuracies in %."""

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
    train_tflops: float  # multiply-adds spent in these, the teacher's answers included, in 10^12


def results(run: Run, recipe: Recipe) -> list[Result]:
    """One row for each finished stage instance, in the recipe's order."""
    finished = {key: done for key in recipe.instances if (done := run.stage(key).done) is not None}
    return [_result(recipe.instances[key], done, recipe) for key, done in finished.items()]


def write_report(run: Run) -> str:
    """Write `report/results.csv` and `report/loss.png`; the table as text. Raises RunError if this is no run."""
    if not run.recipe_path.exists():
        raise RunError(f"{run.path}: no run directory, it has no {run.recipe_path.name}")
    recipe = load_recipe(run.recipe_path)
    rows = results(run, recipe)
    run.report.mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(Result._fields)
    writer.writerows(rows)
    write_atomically(run.report / "results.csv", text.getvalue())
    _plot_losses(run, recipe, run.report / "loss.png")
    return _table(rows, f"{run.path}: {len(rows)} of {len(recipe.instances)} stages done; more in {run.report}")


def _result(instance: Instance, done: Done, recipe: Recipe) -> Result:
    architecture, num_classes = instance.architecture, recipe.data.classes
    assert num_classes is not None, "a run's recipe is resolved"
    images_per_epoch = done.images // done.epochs if done.epochs else 0
    cost = spent(instance.key, recipe, num_classes, images_per_epoch)
    return Result(
        instance.stage_name,
        instance.network_name,
        architecture.num_parameters(num_classes),
        round(architecture.macs(num_classes, recipe.data.resolution) / 1e6, 3),
        done.epochs,
        round(done.top1, 2),
        round(done.top5, 2),
        round(done.seconds, 1),
        cost.epochs,
        cost.images,
        round(cost.macs / 1e12, 3),
    )


def _table(rows: list[Result], caption: str) -> str:
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for name in ("stage", "network"):
        table.add_column(name)
    for name in ("parameters", "MFLOPs", "epochs", "top-1 %", "top-5 %", "seconds", "student epochs", "train TFLOPs"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.stage, row.network, f"{row.parameters:,}", f"{row.mflops:,.3f}", str(row.epochs),
            f"{row.top1:.2f}", f"{row.top5:.2f}", f"{row.seconds:,.0f}", str(row.student_epochs),
            f"{row.train_tflops:,.2f}",
        )  # fmt: skip
    console = Console(file=io.StringIO(), width=130)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _plot_losses(run: Run, recipe: Recipe, path: Path) -> None:
    """One panel per stage: the objective's loss over epochs, imitation with a curve per block."""
    from matplotlib.figure import Figure

    stages = [
        (name, [(instance, read_metrics(run.stage(instance.key).metrics)) for instance in group])
        for name, group in groupby(recipe.instances.values(), key=lambda instance: instance.stage_name)
    ]
    figure = Figure(figsize=(4.2 * len(stages), 3.6), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        axes.set(title=name, xlabel="epoch", yscale="log")
        for instance, lines in curves:
            _plot_stage(axes, instance, lines)
        axes.set_ylabel({"labels": "cross-entropy", "blocks": "MSE", "kl": "KL"}[curves[0][0].stage.objective])
        if axes.lines:
            axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _plot_stage(axes: Axes, instance: Instance, lines: list[dict[str, Any]]) -> None:
    """Training losses as lines, validation losses as dots of the same colour; for imitation also the accuracy."""
    names = [f"mse_block{index + 1}" for index in range(instance.architecture.num_blocks)]
    if instance.stage.objective != "blocks":
        names = ["loss"]
    for name in names:
        train = [(line["epoch"], line[name]) for line in lines if line["kind"] == "train" and name in line]
        val = [(line["epoch"], line[name]) for line in lines if line["kind"] == "val" and name in line]
        label = f"{instance.network_name} {name.removeprefix('mse_') if name != 'loss' else ''}"
        if train:
            (curve,) = axes.plot(*zip(*train, strict=True), label=label)
            if val:
                axes.plot(*zip(*val, strict=True), "o", color=curve.get_color(), markersize=4)
    accuracy = [(line["epoch"], line["top1"]) for line in lines if line["kind"] == "val"]
    if instance.stage.objective == "blocks" and accuracy:
        right = axes.twinx()
        right.plot(*zip(*accuracy, strict=True), "k^--", markersize=5, linewidth=0.8)
        right.set(ylim=(0, 100), ylabel="top-1 % (triangles)")
