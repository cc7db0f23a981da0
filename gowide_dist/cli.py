"""The `gowide` command. Exit status 0 on success, 2 for what the user can mend, 1 for everything else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from gowide_dist.errors import UserError

app = typer.Typer(
    help="Train deep thin image classifiers: go wide, then narrow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Job = Annotated[Path, typer.Argument(help="A recipe, for example jobs/demo.yaml.", metavar="JOB")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values to set by their dotted path.", metavar="[KEY=VALUE]...")
]
RunDir = Annotated[Path, typer.Argument(help="A run directory, for example runs/demo.", metavar="RUN")]
Runs = Annotated[Path, typer.Option(help="Folder of run directories.")]


@app.command()
def encode(
    dataset: Annotated[str, typer.Argument(help="fashion-mnist")],
    out: Annotated[Path, typer.Option(help="Folder for train.beton, val.beton and dataset.json.")],
    root: Annotated[Path | None, typer.Option(help="Folder with the dataset's files as they were published.")] = None,
) -> None:
    """Write a dataset as FFCV files.

    Example: `gowide encode fashion-mnist --out data/fashion-mnist`
    """
    from gowide_dist.data.encode import encode_fashion_mnist

    if dataset != "fashion-mnist":
        raise UserError(f"encode: unknown dataset '{dataset}'; valid: fashion-mnist")
    info = encode_fashion_mnist(out, root)
    counts = ", ".join(f"{split.samples:,} {name}" for name, split in info.splits.items())
    print_line(f"{out}: {info.source}, {counts} images in {len(info.classes)} classes")


@app.command()
def run(
    job: Job,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(help="Processes; default: the GPUs, else one per two cores.", min=1)
    ] = None,
    runs: Runs = Path("runs"),
    only: Annotated[list[str] | None, typer.Option(help="A stage, with all that it needs; may be repeated.")] = None,
    fresh: Annotated[bool, typer.Option(help="Forget what another recipe has left in this run's folder.")] = False,
) -> None:
    """Train all stages of a recipe on this machine, or what is left of them, and print the table of results.

    Stop it whenever you like: the same command continues.

    Example: `gowide run jobs/demo.yaml --nproc 2 stages.finetune.epochs=5`
    """
    from gowide_dist.insight.report import write_report
    from gowide_dist.launch.local import default_num_processes
    from gowide_dist.pipeline import prepare, run_here
    from gowide_dist.recipe import load_recipe

    recipe = load_recipe(job, overrides or [])
    num_processes = nproc or default_num_processes()
    prepared = prepare(recipe, runs, num_processes=num_processes, only=only or [], fresh=fresh)
    total, left = len(prepared.selected), len(prepared.unfinished)
    if left:
        print_line(
            f"{prepared.run.path}: {total - left} of {total} stages done, {left} to train in {num_processes} processes"
        )
    else:
        print_line(f"{prepared.run.path}: all {total} stages are done, nothing to train")
    run_here(prepared, num_processes)
    print_line(write_report(prepared.run))


@app.command()
def submit(
    job: Job,
    cluster: Annotated[Path, typer.Option(help="A cluster profile, for example slurm/clusters/gpu8.yaml.")],
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    only: Annotated[list[str] | None, typer.Option(help="A stage, with all that it needs; may be repeated.")] = None,
    fresh: Annotated[bool, typer.Option(help="Forget what another recipe has left in this run's folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sbatch scripts, and do nothing.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask Slurm whether it would take the jobs.")] = False,
) -> None:
    """Submit one Slurm job per stage that is not done, each after those it needs, and return.

    The same command again submits only what is missing.

    Example: `gowide submit jobs/demo.yaml --cluster slurm/clusters/devcluster.yaml`
    """
    from gowide_dist.insight.status import graph
    from gowide_dist.launch.profile import load_profile
    from gowide_dist.pipeline import prepare_chain, write
    from gowide_dist.recipe import load_recipe

    recipe, profile = load_recipe(job, overrides or []), load_profile(cluster)
    prepared, chain = prepare_chain(recipe, runs, profile, only=only or [], fresh=fresh)
    if dry_run:
        print_line("\n\n".join(chain.scripts().values()) or f"{prepared.run.path}: nothing to submit")
    elif test_only:
        print_line("\n".join(f"{key}: {answer}" for key, answer in chain.try_out().items()) or "nothing to submit")
    else:
        write(prepared, fresh=fresh)
        print_line(graph(prepared, {**chain.queued, **chain.submit()}))


@app.command()
def status(
    run: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the stages of a run, their jobs, how far they are and how long they still take.

    Example: `gowide status runs/demo`
    """
    from gowide_dist.insight import status
    from gowide_dist.run import Run

    rows = status.status(Run(run))
    print_line(json.dumps(status.as_json(rows), indent=2) if as_json else status.table(rows))


@app.command()
def logs(
    run: RunDir,
    stage: Annotated[str, typer.Argument(help="A stage, or stage/network.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing until the job is over.")] = False,
) -> None:
    """Print what the job of a stage prints.

    Example: `gowide logs runs/demo teacher -f`
    """
    from gowide_dist.insight.status import logs
    from gowide_dist.run import Run

    for text in logs(Run(run), stage, follow=follow):
        sys.stdout.write(text)
        sys.stdout.flush()


@app.command()
def cancel(run: RunDir) -> None:
    """Cancel the jobs of a run that are queued or running. `gowide submit` goes on from there.

    Example: `gowide cancel runs/demo`
    """
    from gowide_dist.insight.status import cancel_run
    from gowide_dist.run import Run

    print_line("\n".join(f"cancelled {job}" for job in cancel_run(Run(run))) or f"{run}: no job is queued or running")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory, for example runs/demo.")]) -> None:
    """Print the table of results of a run and write it, with the loss plot, to its report/ folder.

    Example: `gowide report runs/demo`
    """
    from gowide_dist.insight.report import write_report
    from gowide_dist.run import Run

    print_line(write_report(Run(run)))


def print_line(text: str) -> None:
    """Write to standard output as it is."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Entry of the console script."""
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"gowide: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("gowide: stopped; the same command continues\n")
        sys.exit(130)
    except Exception as error:
        from gowide_dist.launch.local import WorkerError

        if not isinstance(error, WorkerError):
            raise
        sys.stderr.write(f"gowide: {error}\n")
        sys.exit(1)
