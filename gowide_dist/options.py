"""Arguments and options that the commands of `gowide` share: types, help, completion."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from gowide_dist.errors import UserError
from gowide_dist.files import expanded
from gowide_dist.recipe import load_recipe
from gowide_dist.run import Run

Job = Annotated[Path, Argument(help="A recipe, for example jobs/demo.yaml.", metavar="JOB")]
Overrides = Annotated[
    list[str] | None, Argument(help="Values to set: seed=1 data.resolution=32.", metavar="[KEY=VALUE]...")
]
RunDir = Annotated[Path, Argument(help="A run directory, for example runs/demo.", metavar="RUN")]


def seeds_of(text: str | None) -> list[int]:
    """The seeds of `--seeds`. Raises UserError unless they are different whole numbers."""
    seeds = (text or "").split(",") if text is not None else []
    if not all(seed.strip().isdecimal() for seed in seeds) or len({*map(int, seeds)}) < len(seeds):
        raise UserError(f"--seeds {text}: should be different whole numbers with commas between, as 0,1,2")
    return [*map(int, seeds)]


def complete_stage(context: typer.Context, incomplete: str) -> list[str]:
    """Shell completion: the stages of the recipe or run that is on the command line already."""
    words = [context.params.get("job"), context.params.get("run"), *context.args]  # args: words before an option
    with contextlib.suppress(UserError, ValueError):
        path = next((expanded(str(word)) for word in words if word), Path())
        recipe = Run(path).recipe() if path.is_dir() else load_recipe(path)
        return [name for name in (*recipe.stages, *recipe.instances) if name.startswith(incomplete)]
    return []


StageName = Annotated[str, Argument(help="A stage, or stage/network.", autocompletion=complete_stage)]
Only = Annotated[
    list[str] | None, Option(help="A stage and those that it needs; may be repeated.", autocompletion=complete_stage)
]
Networks = Annotated[
    Path | None,
    Option("--networks", help="A Python file of your own networks; default: the run's copy.", metavar="FILE.py"),
]
Runs = Annotated[Path, Option(help="Folder of run directories.")]
Fresh = Annotated[bool, Option(help="Discard what unfinished stages have left in this run's folder.")]
Seeds = Annotated[
    str | None, Option(help="A run for each of these seeds, which share the teacher: 0,1,2.", metavar="N,N,...")
]
Nproc = Annotated[
    int | None, Option(help="Processes; default: one per GPU, else per two cores; fewer to divide the batch.", min=1)
]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
