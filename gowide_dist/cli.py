"""The `gowide` command. Exit status 0 on success, 2 for what the user can mend, 1 for everything else."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from gowide_dist.collector import collect_seldom
from gowide_dist.errors import InternalError, UserError, mendable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def print_version(wanted: bool) -> None:
    """Print the version of this package, and its commit where it lies in a repository, and leave."""
    if wanted:
        from gowide_dist.run import code_version

        about = code_version()
        commit = f" at {about['commit'][:12]}{', changed' if about['dirty'] else ''}" if about["commit"] else ""
        print_line(f"gowide_dist {about['gowide_dist']}{commit}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=print_version)] = False,
) -> None:
    """Train deep thin image classifiers: go wide, then narrow."""


data_app = typer.Typer(help="Look after encoded datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Job = Annotated[Path, typer.Argument(help="A recipe, for example jobs/demo.yaml.", metavar="JOB")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values to set by their dotted path.", metavar="[KEY=VALUE]...")
]
RunDir = Annotated[Path, typer.Argument(help="A run directory, for example runs/demo.", metavar="RUN")]


def complete_stage(context: typer.Context, incomplete: str) -> list[str]:
    """For the shell: the stages of the recipe or run that stands on the command line."""
    from gowide_dist.recipe import load_recipe

    given = [context.params.get("job"), context.params.get("run"), *context.args]  # args: before an option's value
    paths = [Path(str(word)) for word in given if word]
    if not paths:
        return []
    path = paths[0]
    try:
        recipe = load_recipe(path / "recipe.yaml" if path.is_dir() else path)
    except UserError:
        return []
    return [name for name in (*recipe.stages, *recipe.instances) if name.startswith(incomplete)]


StageName = Annotated[str, typer.Argument(help="A stage, or stage/network.", autocompletion=complete_stage)]
Only = Annotated[
    list[str] | None,
    typer.Option(help="A stage, with all that it needs; may be repeated.", autocompletion=complete_stage),
]
Runs = Annotated[Path, typer.Option(help="Folder of run directories.")]


class DatasetKind(StrEnum):
    """What `gowide encode` reads."""

    FASHION_MNIST = "fashion-mnist"
    CIFAR10 = "cifar10"
    CIFAR100 = "cifar100"
    IMAGEFOLDER = "imagefolder"
    FFCV = "ffcv"


@app.command()
def encode(
    dataset: Annotated[
        DatasetKind, typer.Argument(help="What to encode: torchvision's layouts on disk, or FFCV's files.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for train.beton, val.beton and dataset.json.")],
    root: Annotated[Path | None, typer.Option(help="Folder of the dataset; fashion-mnist knows Debian's.")] = None,
    write_mode: Annotated[
        str | None,
        typer.Option(help="raw, jpg, or a part as jpg: 0.5. Default: imagefolder jpg, ffcv as it is, else raw."),
    ] = None,
    quality: Annotated[int, typer.Option(help="Of JPEGs, 1 to 100.")] = 90,
    max_side_px: Annotated[int | None, typer.Option(help="Shrink larger images to this longer side.")] = None,
    subset: Annotated[int | None, typer.Option(help="So many training images only, of every class alike.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Make so many training images the validation part.")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave out files that hold no whole image; see skipped.txt.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that read files; default: one a core.", min=0)] = 0,
    cluster: Annotated[Path | None, typer.Option(help="Do it as a Slurm job of this cluster profile.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --cluster: print the sbatch script, and do nothing.")
    ] = False,
) -> None:
    """Write a dataset as FFCV files, every image decoded once on the way; with --cluster as a Slurm job.

    Example: `gowide encode imagefolder --root /data/imagenet --out data/imagenet --max-side-px 512`
    """
    from gowide_dist.data import encode as encoders
    from gowide_dist.stop import raise_on_sigterm

    jpg_share = {DatasetKind.IMAGEFOLDER: 1.0, DatasetKind.FFCV: None}.get(dataset, 0.0)
    if write_mode:
        try:
            jpg_share = float({"raw": "0", "jpg": "1"}.get(write_mode, write_mode))
        except ValueError as error:
            raise UserError(f"--write-mode {write_mode}: should be raw, jpg or a part such as 0.5") from error
    options = encoders.Options(jpg_share, quality, max_side_px, subset, held_out, skip_bad, workers)
    if dry_run and not cluster:
        raise UserError("encode --dry-run: prints the script of a Slurm job; give a --cluster profile")
    if cluster:
        from gowide_dist.launch.encode import KEY, encode_job
        from gowide_dist.launch.profile import load_profile
        from gowide_dist.launch.slurm import log_file

        chain = encode_job(dataset.value, out, root, options, load_profile(cluster), rehearse=dry_run)
        if dry_run:
            print_line("\n".join(chain.scripts()))
            return
        job_id = {**chain.queued, **chain.submit()}[KEY]
        print_line(f"{out}  job {job_id}{' already' if chain.queued else ''}  {log_file(chain.folder, job_id)}")
        return
    raise_on_sigterm()
    info = encoders.encode(dataset.value, out, root, options)
    counts = ", ".join(f"{split.samples:,} {name}" for name, split in info.splits.items())
    print_line(f"{out}: {info.source}, {counts} images in {len(info.classes)} classes")


@data_app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `gowide encode` wrote.", metavar="DIR")],
) -> None:
    """Read all of a dataset: checksums, counts, and every image decoded.

    Example: `gowide data verify data/imagenet`
    """
    from gowide_dist.data.verify import verify_dataset

    info = verify_dataset(folder)
    counts = ", ".join(f"{split.samples:,} {name}" for name, split in info.splits.items())
    print_line(f"{folder}: whole, {counts} images in {len(info.classes)} classes")


@app.command()
def bench(
    job: Job,
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="Another dataset than the recipe's.")] = None,
    images: Annotated[Path | None, typer.Option(help="The same images as class folders, for torchvision.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="What to measure, see above; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Measure this machine: each way of working against the plain one, in turns in one run, as ratios.

    - `loader`: images a second against stock FFCV's and torchvision's
    - `loop`: a step of the training loop over a bare forward, backward, step; **less is better**
    - `teacher`: a plain teacher's forward pass over ours
    - `imitate`: the plain way of imitation, with hooks on a teacher that runs whole for every block, over ours
    - `distill_stored`: a distillation step the plain way, teacher and all, over one with stored logits
      (in both the plain way's images are read by torchvision; `plain_in_memory` is the ratio without reading them)
    - `students_together`: three students in a stage each over three in one pass
    - `two_processes`: images a second of two processes with a thread each over one with two threads
    - `simulation`: a step of two processes as `plan --scale` simulates it, over one that was measured
    - `checkpoint`: share of the training time that saving costs; **less is better**
    - `start_seconds`: seconds from `gowide run` to the first training step; **less is better**
    - `growth`, only when it is named: seconds and memory at 1, 2 and 4 times the images, the width and the processes

    With `--json` every name but `loader` and `growth` has `ratio`, the median of `pairs` that were measured in turns,
    between the quartiles `low` and `high`, then `what` is over what, its `target`, and details. `machine` says what it
    was measured on: on a busy machine the spread shows it. Networks, batch size and images are the recipe's, the
    weights random. Nothing is written but into a temporary folder.

    Example: `gowide bench jobs/demo.yaml --only imitate --only loop`
    """
    from gowide_dist.insight import bench as benches
    from gowide_dist.recipe import load_recipe

    recipe = load_recipe(job, overrides or [])
    names = benches.choose(recipe, only or [])
    machine = benches.machine()
    if not as_json:
        print_line(", ".join(f"{name} {value}" for name, value in machine.items()))
    results = {}
    for name, result in benches.measure(recipe, names, data=data, images=images):
        results[name] = result
        if not as_json:
            print_line(benches.as_text(name, result))
    if as_json:
        print_line(json.dumps({"machine": machine, **results}, indent=2))


@app.command()
def run(
    job: Job,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(help="Processes; default: the GPUs, else one per two cores.", min=1)
    ] = None,
    runs: Runs = Path("runs"),
    only: Only = None,
    fresh: Annotated[bool, typer.Option(help="Forget what another recipe has left in this run's folder.")] = False,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Train the networks of a stage one after the other: takes less memory.")
    ] = False,
) -> None:
    """Train all stages of a recipe on this machine, or what is left of them, and print the table of results.

    Stop it whenever you like: the same command continues. The networks of a stage (`train: [half, quarter]`) train
    together, on one data stream and one teacher's answers, with the weights that each would have alone.

    Example: `gowide run jobs/demo.yaml --nproc 2 stages.finetune.epochs=5`
    """
    from gowide_dist.insight.report import write_report
    from gowide_dist.launch.local import default_num_processes, num_gpus, run_here
    from gowide_dist.prepare import prepare
    from gowide_dist.recipe import load_recipe

    recipe = load_recipe(job, overrides or [])
    num_processes = nproc or default_num_processes()
    prepared = prepare(recipe, runs, num_processes=num_processes, on_gpus=num_gpus() > 0, only=only or [], fresh=fresh)
    total, left = len(prepared.selected), len(prepared.unfinished)
    if left:
        print_line(
            f"{prepared.run.path}: {total - left} of {total} stages done, {left} to train in {num_processes} processes"
        )
    else:
        print_line(f"{prepared.run.path}: all {total} stages are done, nothing to train")
    run_here(prepared, num_processes, sequential=sequential)
    print_line(write_report(prepared.run))


@app.command()
def plan(
    job: Job,
    overrides: Overrides = None,
    cluster: Annotated[Path | None, typer.Option(help="A cluster profile; default: the cores of this machine.")] = None,
    runs: Runs = Path("runs"),
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine; default as of run.", min=1)] = None,
    images: Annotated[int | None, typer.Option(help="Training images, where they are not encoded.", min=1)] = None,
    classes: Annotated[int | None, typer.Option(help="Classes, where the images are not encoded.", min=1)] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time a few real steps of each stage here.")] = False,
    scale: Annotated[
        bool, typer.Option("--scale", help="Simulate 1 to 64 nodes: the profile's, else of 8 GPUs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe costs before anything is spent: FLOPs, memory, hours, requeues, and what looks wrong.

    Without a profile the hours are this machine's, by its cores; with --measure by a few real steps.

    Example: `gowide plan jobs/imagenet_rn50.yaml --cluster slurm/clusters/gpu8.yaml`
    """
    from gowide_dist.insight import plan as plans
    from gowide_dist.insight.assumed import data_size
    from gowide_dist.launch.local import default_num_processes
    from gowide_dist.launch.profile import load_profile
    from gowide_dist.recipe import load_recipe

    recipe, profile = load_recipe(job, overrides or []), load_profile(cluster) if cluster else None
    if measure and (profile or scale):
        raise UserError("plan: --measure times this machine; leave out --cluster and --scale, or run it in a job there")
    if scale:
        from gowide_dist.insight import scale as scales

        assumptions, rows = scales.scale(recipe, data_size(recipe, images, classes), profile)
        if as_json:
            nodes = [row._asdict() for row in rows]
            print_line(json.dumps({"assumptions": assumptions, "nodes": nodes}, indent=2))
        else:
            print_line(scales.table(assumptions, rows))
        return
    num_processes = nproc or default_num_processes()
    measured = None
    if measure:
        from gowide_dist.insight.timing import measure as time_stages

        measured = time_stages(recipe, num_processes)
    result = plans.plan(
        recipe, runs, profile=profile, num_processes=num_processes, images=images, classes=classes, measured=measured
    )
    print_line(json.dumps(result.as_json(), indent=2) if as_json else plans.table(result))


@app.command()
def submit(
    job: Job,
    cluster: Annotated[Path, typer.Option(help="A cluster profile, for example slurm/clusters/gpu8.yaml.")],
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    only: Only = None,
    fresh: Annotated[bool, typer.Option(help="Forget what another recipe has left in this run's folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sbatch scripts, and do nothing.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask Slurm whether it would take the jobs.")] = False,
) -> None:
    """Submit one Slurm job per stage that is not done, each after those it needs, and return.

    The same command again submits only what is missing.

    Example: `gowide submit jobs/demo.yaml --cluster slurm/clusters/devcluster.yaml`
    """
    from gowide_dist.insight.status import graph
    from gowide_dist.launch.chain import prepare_chain, rehearse_chain
    from gowide_dist.launch.profile import load_profile
    from gowide_dist.launch.queue import require
    from gowide_dist.prepare import write_run
    from gowide_dist.recipe import load_recipe

    recipe, profile = load_recipe(job, overrides or []), load_profile(cluster)
    if dry_run or test_only:
        chain = rehearse_chain(recipe, runs, profile, only=only or [], fresh=fresh)
        print_line("\n".join(chain.scripts() if dry_run else chain.try_out()) or "nothing to submit")
        return
    require("sbatch")
    prepared, chain = prepare_chain(recipe, runs, profile, only=only or [], fresh=fresh)
    write_run(prepared, fresh=fresh, in_jobs={*chain.queued, *chain.leaving})
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
    stage: StageName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing until the job is over.")] = False,
    rank: Annotated[int, typer.Option(help="The process whose log it is.", min=0)] = 0,
) -> None:
    """Print what the job of a stage prints.

    Example: `gowide logs runs/demo teacher -f`
    """
    from gowide_dist.insight.status import logs
    from gowide_dist.run import Run

    for text in logs(Run(run), stage, follow=follow, rank=rank):
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


@app.command("eval")
def evaluate(
    run: RunDir,
    stage: StageName,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder that `gowide encode` wrote, or one file of it as DIR/test.beton; default: the run's."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for eval.json and confusion.csv.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the whole confusion matrix.")] = False,
) -> None:
    """Measure a finished network on every validation image: accuracies, by class too, confusion, calibration.

    Example: `gowide eval runs/demo finetune --out runs/demo/report/finetune`
    """
    from gowide_dist.insight import evaluate
    from gowide_dist.insight.trained import open_trained

    path = data / "val.beton" if data and data.suffix != ".beton" else data
    found = evaluate.evaluate(open_trained(run, stage), path)
    if out:
        evaluate.write_evaluation(found, out)
    print_line(json.dumps(evaluate.as_json(found), indent=2) if as_json else evaluate.table(found))


@app.command()
def export(
    run: RunDir,
    stage: StageName,
    to: Annotated[Path, typer.Option(help="Folder for the files; a new or empty one, or of the same export.")],
    int8: Annotated[bool, typer.Option(help="Also write model.int8.onnx.")] = True,
    images: Annotated[
        int | None, typer.Option(help="Compare on so many validation images; default: all.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print export.json.")] = False,
) -> None:
    """Write a finished network as safetensors, torch.export program, ONNX and int8 ONNX, and compare and time them.

    Example: `gowide export runs/demo finetune --to exports/demo`
    """
    from gowide_dist.insight import export
    from gowide_dist.insight.trained import open_trained

    report = export.export(open_trained(run, stage), to, int8=int8, images=images)
    print_line(json.dumps(report, indent=2) if as_json else export.table(report))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, finished or not.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: report/ of the first run.")] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="Latency, dead channels, agreement with the teacher: once a network."
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the results of a run and write report.html, one page with all pictures, with CSV and PNG files beside it.

    Of several runs, write runs.html: mean and spread over those that differ only in their seed, and how far each
    stage is above the baseline.

    Example: `gowide report runs/fashion_mnist runs/fashion_mnist-1`
    """
    from gowide_dist.insight.report import report
    from gowide_dist.run import Run

    text, data = report([Run(path) for path in runs], measured=measure, out=out)
    print_line(json.dumps(data, indent=2) if as_json else text)


@app.command()
def doctor(
    runs: Runs = Path("runs"),
    cluster: Annotated[Path | None, typer.Option(help="A cluster profile that you want to use.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether this machine can do it: packages, FFCV, JPEGs, cores, GPUs, Slurm, disk; and how to mend what can't.

    Ends with status 1 if anything is bad. It takes up to a minute.

    Example: `gowide doctor --cluster slurm/clusters/gpu8.yaml`
    """
    from gowide_dist.insight.doctor import BAD, examine

    findings = []
    for finding in examine(runs, cluster):
        findings.append(finding)
        if not as_json:
            print_line(str(finding))
    if as_json:
        print_line(json.dumps([finding._asdict() for finding in findings], indent=2))
    if any(finding.state == BAD for finding in findings):
        raise typer.Exit(1)


def print_line(text: str) -> None:
    """Write to standard output as it is."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Entry of the console script."""
    collect_seldom()
    try:
        status = app(standalone_mode=False) or 0
        if status == 130:  # what typer makes of Ctrl-C
            sys.stderr.write("gowide: stopped; the same command continues\n")
        sys.exit(status)
    except TyperException as error:  # of usage: also without arguments, when it has printed the help and says nothing
        if message := error.format_message().replace("Value error, ", "").rstrip("."):
            command = getattr(getattr(error, "ctx", None), "command_path", "gowide")
            sys.stderr.write(f"gowide: {message}; see `{command} --help`\n")
        sys.exit(2)
    except UserError as error:
        sys.stderr.write(f"gowide: {error}\n")
        sys.exit(2)
    except OSError as error:
        if (line := mendable(error)) is None:
            raise
        sys.stderr.write(f"gowide: {line}\n")
        sys.exit(2)
    except InternalError as error:
        sys.stderr.write(f"gowide: {error}\n")
        sys.exit(1)
