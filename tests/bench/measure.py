"""The measurements by name. Each is a `Figure` as a mapping that JSON can hold."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gowide_dist.errors import UserError
from gowide_dist.recipe import Recipe
from tests.bench import processes, teaching, training
from tests.bench.pairs import Effort, Figure
from tests.bench.subject import Subject, open_subject

FIGURES: dict[str, Callable[[Subject], Figure]] = {
    "loop": training.loop,
    "teacher": teaching.teacher,
    "imitate": teaching.imitate,
    "distill_stored": teaching.distill_stored,
    "students_together": teaching.students_together,
    "two_processes": processes.two_processes,
    "checkpoint": training.checkpoint,
    "start_seconds": processes.start_seconds,
}
_NEEDS = {
    "teacher": ("kl", "blocks"),
    "imitate": ("blocks",),
    "distill_stored": ("kl",),
    "students_together": ("kl",),
}


def choose(recipe: Recipe, only: Sequence[str]) -> list[str]:
    """`only`, or else all that the recipe has a stage for. Raises UserError if it has none for a name in `only`."""
    objectives = {stage.objective for stage in recipe.stages.values()}
    fits = [name for name in FIGURES if name not in _NEEDS or objectives & set(_NEEDS[name])]
    for name in only:
        if name not in fits:
            needed = " or ".join(_NEEDS[name])
            raise UserError(f"bench: {name} needs a stage with objective {needed}, which recipe {recipe.name} has not")
    return [name for name in fits if name in (only or FIGURES)]


def measure(recipe: Recipe, names: Sequence[str], effort: Effort | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of the named measurements, each as soon as it is known. Writes into a temporary folder only."""
    with (
        tempfile.TemporaryDirectory(prefix="gowide-bench-") as folder,
        open_subject(recipe, Path(folder), effort or Effort()) as subject,
    ):
        for name in names:
            yield name, FIGURES[name](subject).as_json()
