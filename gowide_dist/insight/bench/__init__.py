"""Measurements on this machine in one run: each way of working against the plain one, as ratios.

A result is a mapping that JSON can hold. `loader` and `growth` have shapes of their own; every other measurement is a
`Figure`: `ratio` between `low` and `high`, of so many `pairs`; `what` is over what, and `target`; then its details.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gowide_dist.errors import UserError
from gowide_dist.insight.bench import processes, teaching, training
from gowide_dist.insight.bench.loader import loader
from gowide_dist.insight.bench.pairs import Effort, Figure
from gowide_dist.insight.bench.subject import Subject, open_subject
from gowide_dist.recipe import Recipe
from gowide_dist.schema import nearest

_FIGURES: dict[str, Callable[[Subject], Figure]] = {
    "loop": training.loop,
    "teacher": teaching.teacher,
    "imitate": teaching.imitate,
    "distill_stored": teaching.distill_stored,
    "students_together": teaching.students_together,
    "two_processes": processes.two_processes,
    "simulation": processes.simulation,
    "checkpoint": training.checkpoint,
    "start_seconds": processes.start_seconds,
}
_ALL = ("loader", *_FIGURES, "growth")
_NEEDS = {
    "teacher": ("kl", "blocks"),
    "imitate": ("blocks",),
    "distill_stored": ("kl",),
    "students_together": ("kl",),
}


def choose(recipe: Recipe, only: Sequence[str]) -> list[str]:
    """What to measure: `only`, or else all but growth that the recipe has a stage for.

    Raises UserError on a name of no measurement, or of one that the recipe has no stage for.
    """
    objectives = {stage.objective for stage in recipe.stages.values()}
    fits = [name for name in _ALL if name not in _NEEDS or objectives & set(_NEEDS[name])]
    for name in only:
        if name not in _ALL:
            raise UserError(f"bench: nothing called '{name}' to measure, {nearest(name, list(_ALL))}")
        if name not in fits:
            needed = " or ".join(_NEEDS[name])
            raise UserError(f"bench: {name} needs a stage with objective {needed}, which recipe {recipe.name} has not")
    return [name for name in fits if name in (only or _ALL[:-1])]


def measure(
    recipe: Recipe,
    names: Sequence[str],
    *,
    data: Path | None = None,
    images: Path | None = None,
    effort: Effort | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of the named measurements, each as soon as it is there. Writes into a temporary folder only.

    data, images: the folders that `loader` reads, as there; default: the recipe's, and no plain images.
    Raises UserError if the data is not there.
    """
    effort = effort or Effort()
    if (data or images) and "loader" not in names:
        raise UserError("bench: --data and --images are for `loader`, which --only leaves out")
    if "loader" in names:
        resolution = recipe.data.resolution if recipe.data.augment.crop else None
        folder = data or recipe.data.train.parent
        yield "loader", loader(folder, images, batch_size=recipe.batch_size, resolution=resolution)
    if figures := [name for name in names if name in _FIGURES]:
        with (
            tempfile.TemporaryDirectory(prefix="gowide-bench-") as scratch,
            open_subject(recipe, Path(scratch), effort) as subject,
        ):
            for name in figures:
                yield name, _FIGURES[name](subject).as_json()
    if "growth" in names:
        yield "growth", processes.growth(recipe, effort)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cores = len(os.sched_getaffinity(0))
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else "unknown",
        "cores": cores,
        "threads": int(os.environ.get("OMP_NUM_THREADS", cores)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "load_average": round(os.getloadavg()[0], 1),  # beyond the cores, what is measured in seconds is noise
    }


def as_text(name: str, result: Mapping[str, Any]) -> str:
    """A result as lines for people."""
    if name == "loader":
        return "\n".join(["loader, medians over the rounds of one run:", *_lines(result)])
    if name == "growth":
        rows = [
            f"  {of} x{row['times']}: {row['seconds']:.2f} s (x{row['seconds_ratio']:.2f}), "
            f"{row['memory_mib']} MiB (x{row['memory_ratio']:.2f})"
            for of, rows in result.items()
            for row in rows
        ]
        return "\n".join(["growth of the seconds and the memory of training:", *rows])
    spread = f"{result['ratio']:.4g}  ({result['low']:.4g} to {result['high']:.4g} in {result['pairs']} pairs)"
    known = ("ratio", "low", "high", "pairs", "what", "target")
    details = {key: value for key, value in result.items() if key not in known}
    return "\n".join([f"{name}  {spread}  target: {result['target']}", f"  {result['what']}", *_lines(details)])


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"  {name:30}{_plain(value)}" for name, value in values.items()]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return str(value)
