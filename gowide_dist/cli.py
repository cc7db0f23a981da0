"""The `gowide` command. Exit status 0 on success, 2 for what the user can fix, 1 for everything else."""

from __future__ import annotations

import functools
import json
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.exceptions import TyperException

from gowide_dist.errors import InternalError, UserError, fixable
from gowide_dist.files import expanded
from gowide_dist.launch.local import choose_num_processes, num_gpus, torchrun
from gowide_dist.launch.profile import load_profile
from gowide_dist.options import (
    Fresh,
    Job,
    Json,
    Networks,
    Nproc,
    Only,
    Overrides,
    RunDir,
    Runs,
    Seeds,
    StageName,
    seeds_of,
)
from gowide_dist.progress import write_text_only
from gowide_dist.run import Run, load_jobs, runs_of_seeds

to_json = functools.partial(json.dumps, indent=2)  # as `--json` prints it
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def print_version(wanted: bool) -> None:
    """Print the version of this package, with the commit if its folder is in a git repository, and exit."""
    if wanted:
        from gowide_dist.environment import code_version

        version = code_version()
        commit = f" at {version['commit'][:12]}{', changed' if version['dirty'] else ''}" if version["commit"] else ""
        print_line(f"gowide_dist {version['gowide_dist']}{commit}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, Option("--version", help="Print the version.", callback=print_version)] = False,
) -> None:
    """Train deep thin image classifiers: go wide, then narrow."""


data_app = typer.Typer(help="Check encoded datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def command(name: str | None = None, group: typer.Typer = app) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of a group, as typer registers it, with `~` and variables of all its paths replaced."""

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(each) for each in value]
        return expanded(value) if isinstance(value, Path) else value

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def with_paths(**values: Any) -> None:
            try:
                values = {name: replaced(value) for name, value in values.items()}
            except ValueError as error:
                raise UserError(str(error)) from error
            function(**values)

        return group.command(name)(with_paths)

    return register


Dataset = Literal[
    "fashion-mnist", "cifar10", "cifar100", "imagefolder", "imagenet", "tiny-imagenet", "parquet", "webdataset", "ffcv"
]
BenchPart = StrEnum("BenchPart", ["loader", "stages"])  # typer has no lists of Literal


@command()
def encode(
    dataset: Annotated[Dataset, Argument(help="What to encode, in the layout that it has on disk.")],
    out: Annotated[Path, Option(help="Folder for train.beton, val.beton and dataset.json.")],
    root: Annotated[Path | None, Option(help="Folder of the dataset; fashion-mnist knows Debian's.")] = None,
    write_mode: Annotated[
        str | None,
        Option(help="raw, jpg, keep (JPEGs as they are) or a fraction as JPEG; default: pixels raw, files jpg."),
    ] = None,
    quality: Annotated[int, Option(help="JPEG quality.", min=1, max=100)] = 90,
    max_side_px: Annotated[int | None, Option(help="Shrink images whose longer side exceeds it.", min=1)] = None,
    background: Annotated[str, Option(help="The colour under transparent pixels: a name or #rrggbb.")] = "white",
    bits: Annotated[int | None, Option(help="Bits that images of 16 bits really use.", min=9, max=16)] = None,
    val_labels: Annotated[Path | None, Option(help="Labels of validation images without class folders.")] = None,
    subset: Annotated[int | None, Option(help="Use only N training images, stratified by class.", min=1)] = None,
    held_out: Annotated[int | None, Option(help="Use N training images for validation, stratified.", min=1)] = None,
    skip_bad: Annotated[bool, Option(help="Leave out damaged images, and list them in skipped.txt.")] = False,
    workers: Annotated[int, Option(help="Processes that read files; default: one a core.", min=0)] = 0,
    cluster: Annotated[Path | None, Option(help="Encode in a Slurm job, by this cluster profile.")] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="With --cluster: print the sbatch script, and do nothing.")
    ] = False,
) -> None:
    """Write a dataset as FFCV files, every image decoded once on the way; with --cluster as a Slurm job.

    Stopped, the same command goes on from what it has.

    Example: `gowide encode imagenet --root /data/imagenet --out data/imagenet --max-side-px 512`
    """
    from gowide_dist.data import encode as encoders
    from gowide_dist.stop import raise_on_sigterm

    jpg_share = encoders.jpg_share_of(dataset, write_mode)
    options = encoders.Options(
        jpg_share, quality, max_side_px, background, bits, subset, held_out, skip_bad, workers,
        str(val_labels.absolute()) if val_labels else None,
    )  # fmt: skip
    if dry_run and not cluster:
        raise UserError("encode --dry-run: prints the script of a Slurm job; give a --cluster profile")
    if cluster:
        from gowide_dist.launch.encode import encode_job
        from gowide_dist.launch.queue import ENCODE
        from gowide_dist.launch.slurm import log_file

        chain = encode_job(dataset, out, root, options, load_profile(cluster), rehearse=dry_run)
        if dry_run:
            print_line("\n".join(chain.scripts()))
            return
        job_id = chain.submit()[ENCODE]
        print_line(f"{out}  job {job_id}{'' if chain.jobs else ' already'}  {log_file(chain.folder, job_id)}")
        return
    raise_on_sigterm()
    info = encoders.encode(dataset, out, root, options)
    print_line(f"{out}: {info.source}, {info.summary}")


@command(group=data_app)
def verify(folder: Annotated[Path, Argument(help="A folder written by `gowide encode`.", metavar="DIR")]) -> None:
    """Check a whole dataset: checksums, counts, labels, and every image decoded.

    Example: `gowide data verify data/imagenet`
    """
    from gowide_dist.data.verify import verify_dataset

    print_line(f"{folder}: OK, {verify_dataset(folder).summary}")


@command()
def bench(
    job: Job,
    overrides: Overrides = None,
    networks: Networks = None,
    nproc: Nproc = None,
    data: Annotated[Path | None, Option(help="Another dataset than the recipe's, for the loader.")] = None,
    images: Annotated[Path | None, Option(help="The same images as class folders, for torchvision.")] = None,
    only: Annotated[list[BenchPart] | None, Option(help="Measure only this.")] = None,
    as_json: Json = False,
) -> None:
    """Measure whether this machine feeds and trains a recipe.

    - `loader`: images per second and growth of memory, against stock FFCV (always without a policy, jitter and
      erasing) and, with --images, torchvision
    - `stages`: a few real steps of every stage: images per second, the part of the time spent waiting for data, and
      the peak memory of a process (of its GPU, if it has one)

    `machine` says what it was measured on. Nothing is written but into a temporary folder.

    Example: `gowide bench jobs/demo.yaml --only loader`
    """
    from gowide_dist.bench import loader, machine, stages, tables
    from gowide_dist.insight.text import table

    [recipe], parts = load_jobs(job, overrides or [], networks, Path("runs")), only or list(BenchPart)
    if (data or images) and "loader" not in parts:
        raise UserError("bench: --data and --images are for `loader`, which --only leaves out")
    results: dict[str, Any] = {"machine": machine()}
    if "loader" in parts:
        resolution = recipe.data.resolution if recipe.data.augment.crop else None
        folder = data or recipe.data.train.parent
        results["loader"] = loader(
            folder, images, batch_size=recipe.batch_size, resolution=resolution, augment=recipe.data.augment
        )
    if "stages" in parts:
        results["stages"] = stages(recipe, choose_num_processes(recipe, nproc))
    if as_json:
        print_line(to_json(results))
    else:
        print_line(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
        print_line("\n".join(table(head, rows) for head, rows in tables(results)))


@command()
def run(
    job: Job,
    overrides: Overrides = None,
    networks: Networks = None,
    nproc: Nproc = None,
    runs: Runs = Path("runs"),
    only: Only = None,
    fresh: Fresh = False,
    seeds: Seeds = None,
    sequential: Annotated[bool, Option("--sequential", help="Train the networks one by one: less memory.")] = False,
    write_only: Annotated[
        bool, Option("--write-only", help="Write the run, and print what a torchrun of your own executes.")
    ] = False,
) -> None:
    """Train the unfinished stages of a recipe on this machine, and print the table of results.

    Stop it at any time: the same command continues. The networks of a stage (`train: [half, quarter]`) train together,
    on one data stream and one forward pass of the teacher, and end with the weights that each would have alone.

    Example: `gowide run jobs/demo.yaml --nproc 2 stages.distill.epochs=5`
    """
    from gowide_dist.insight.report import report
    from gowide_dist.prepare import check_run, prepare

    recipes = load_jobs(job, overrides or [], networks, runs, seeds_of(seeds))
    num_processes = (nproc or 1) if write_only else choose_num_processes(recipes[0], nproc)
    for recipe in recipes[1:]:  # what does not fit is told before anything is trained
        check_run(recipe, runs, only=only or [], fresh=fresh)
    for recipe in recipes:
        on_gpus = write_only or num_gpus() > 0
        prepared = prepare(recipe, runs, num_processes=num_processes, on_gpus=on_gpus, only=only or [], fresh=fresh)
        total, left = len(prepared.selected), len(prepared.unfinished)
        processes = "one process" if num_processes == 1 else f"{num_processes} processes"
        to_train = f"{total - left} of {total} stages done, {left} to train in {processes}"
        print_line(f"{prepared.run.path}: {to_train if left else f'all {total} stages are done, nothing to train'}")
        keys = [instance.key for instance in prepared.unfinished]
        arguments = [str(prepared.run.path), *keys, *(["--sequential"] if sequential else [])]
        if left and write_only:
            print_line(f"-m gowide_dist.pipeline {shlex.join(arguments)}")
        elif left:
            torchrun("gowide_dist.pipeline", arguments, num_processes)
    if not write_only:
        print_line(report([Run(runs / recipe.name) for recipe in recipes], measure=False)[0])


@command()
def plan(
    job: Job,
    overrides: Overrides = None,
    networks: Networks = None,
    cluster: Annotated[Path | None, Option(help="A cluster profile; default: the cores of this machine.")] = None,
    runs: Runs = Path("runs"),
    nproc: Nproc = None,
    images: Annotated[int | None, Option(help="Training images, where they are not encoded.", min=1)] = None,
    classes: Annotated[int | None, Option(help="Classes, where the images are not encoded.", min=1)] = None,
    measure: Annotated[bool, Option("--measure", help="Time a few real steps of each stage here.")] = False,
    scale: Annotated[bool, Option("--scale", help="Simulate 1 to 64 nodes: the profile's, else of 8 GPUs.")] = False,
    seeds: Seeds = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe costs before anything is spent: FLOPs, memory, hours, requeues, and what looks wrong.

    Without a profile the hours are this machine's, by its cores; with --measure by a few real steps.

    Example: `gowide plan jobs/imagenet_rn50.yaml --cluster slurm/clusters/gpu8.yaml`
    """
    from gowide_dist.insight.assumed import data_size, this_machines_cores
    from gowide_dist.insight.plan import plan, plan_seeds, plan_table, seeds_table
    from gowide_dist.insight.scale import scale_nodes, scale_table
    from gowide_dist.insight.timing import measured_cores

    recipes = load_jobs(job, overrides or [], networks, runs, seeds_of(seeds))
    recipe, profile = recipes[0], load_profile(cluster) if cluster else None
    if scale and seeds:
        raise UserError("plan: --scale simulates one run; leave out --seeds")
    if measure and (profile or scale):
        raise UserError("plan: --measure times this machine; leave out --cluster and --scale, or run it in a job there")
    size, num_processes = data_size(recipe, images, classes), choose_num_processes(recipe, nproc)
    if scale:
        assumptions, nodes = scale_nodes(recipe, size, profile)
        data, text = {"assumptions": assumptions, "nodes": nodes}, scale_table(assumptions, nodes)
    else:
        cores = measured_cores(recipe, num_processes) if measure else this_machines_cores(num_processes)
        where, known_runs = profile or cores, None if images else runs
        if seeds:
            planned = plan_seeds(recipes, size, where, runs=known_runs)
            data, text = asdict(planned), seeds_table(planned)
        else:
            result = plan(recipe, size, where, runs=known_runs)
            data, text = asdict(result), plan_table(result)
    print_line(to_json(data) if as_json else text)


@command()
def submit(
    job: Job,
    cluster: Annotated[Path, Option(help="A cluster profile, for example slurm/clusters/gpu8.yaml.")],
    overrides: Overrides = None,
    networks: Networks = None,
    runs: Runs = Path("runs"),
    only: Only = None,
    fresh: Fresh = False,
    seeds: Seeds = None,
    copy_code: Annotated[bool, Option(help="Jobs run the package as it is now, from a copy in the run.")] = True,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the sbatch scripts, and do nothing.")] = False,
    test_only: Annotated[bool, Option("--test-only", help="Ask Slurm whether it would take the jobs.")] = False,
) -> None:
    """Submit a Slurm job for each unfinished stage, which starts after those that it needs, and return.

    The same command again submits only what is missing.

    --seeds submits a chain for each seed, side by side; the first one's teacher teaches all.

    Example: `gowide submit jobs/demo.yaml --cluster slurm/clusters/devcluster.yaml`
    """
    from gowide_dist.insight.status import submitted
    from gowide_dist.launch.chain import prepare_chain, rehearse_chain
    from gowide_dist.launch.queue import require
    from gowide_dist.prepare import write_run

    recipes, profile = load_jobs(job, overrides or [], networks, runs, seeds_of(seeds)), load_profile(cluster)
    options: dict[str, Any] = {"only": only or [], "fresh": fresh, "copy_code": copy_code}
    shared: dict[str, str] = {}  # jobs of earlier seeds, by fingerprint
    if dry_run or test_only:
        lines: list[str] = []
        for recipe in recipes:
            chain = rehearse_chain(recipe, runs, profile, shared=shared if seeds else None, **options)
            lines += chain.scripts() if dry_run else chain.try_out()
            expected = chain.rehearsed_ids.items()
            shared |= {chain.fingerprints[key]: f"{job_id}_OF_{recipe.name}" for key, job_id in expected}
        print_line("\n".join(lines) or f"{runs / recipes[0].name}: all of it is done; nothing to submit")
        return
    require("sbatch")
    for recipe in recipes[1:]:  # what does not fit is told before anything is submitted
        prepare_chain(recipe, runs, profile, **options)
    for recipe in recipes:
        prepared, chain = prepare_chain(recipe, runs, profile, shared=shared if seeds else None, **options)
        write_run(prepared, fresh=fresh, in_jobs=chain.in_jobs)
        ids = chain.submit()
        shared |= {chain.fingerprints[key]: job_id for key, job_id in ids.items() if key in chain.fingerprints}
        if len(recipes) > 1:
            print_line(f"{prepared.run.path}:")
        print_line(submitted(prepared, chain, ids))


@command()
def status(run: RunDir, seeds: Seeds = None, as_json: Json = False) -> None:
    """Show the stages of a run: their jobs, progress and time left.

    Example: `gowide status runs/demo`
    """
    from gowide_dist.insight.status import status, status_table

    runs = runs_of_seeds(Run(run), seeds_of(seeds))
    tables = {str(each.path): status(each) for each in runs}
    if as_json:
        rows = {path: [asdict(row) for row in rows] for path, rows in tables.items()}
        print_line(to_json(rows if seeds else rows[str(run)]))
    else:
        head = "{}:\n" if seeds else ""
        print_line("\n".join(f"{head.format(path)}{status_table(rows)}" for path, rows in tables.items()))


@command()
def logs(
    run: RunDir,
    stage: StageName,
    follow: Annotated[bool, Option("--follow", "-f", help="Print until the job is over.")] = False,
    rank: Annotated[int, Option(help="Rank of the process.", min=0)] = 0,
) -> None:
    """Print the log of a stage's job.

    Example: `gowide logs runs/demo teacher -f`
    """
    from gowide_dist.insight.status import logs

    for text in logs(Run(run), stage, follow=follow, rank=rank):
        sys.stdout.write(text)
        sys.stdout.flush()


@command()
def cancel(run: RunDir, seeds: Seeds = None) -> None:
    """Cancel the queued and running jobs of a run. `gowide submit` continues it.

    Example: `gowide cancel runs/demo`
    """
    from gowide_dist.insight.status import cancel_runs

    cancelled = cancel_runs(runs_of_seeds(Run(run), seeds_of(seeds)))
    print_line("\n".join(f"cancelled {job}" for job in cancelled) or f"{run}: no job is queued or running")


@command("eval")
def evaluate(
    run: RunDir,
    stage: StageName,
    data: Annotated[Path | None, Option(help="Encoded folder or file, as DIR/test.beton; default: the run's.")] = None,
    images: Annotated[Path | None, Option(help="Or images not encoded: a folder with a folder per class.")] = None,
    out: Annotated[
        Path | None, Option(help="Folder for eval.json, confusion.csv, predictions.csv and logits.npy.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON, with the whole confusion matrix.")] = False,
) -> None:
    """Evaluate a finished network on every validation image: accuracies, also per class, confusion, calibration.

    The run's folder and the images are enough, on any machine. The class folders of --images have the classes' names,
    and some may be absent.

    Example: `gowide eval runs/demo distill --out runs/demo/report/distill`
    """
    from gowide_dist.insight import evaluate
    from gowide_dist.insight.trained import open_trained

    if data and images:
        raise UserError("eval: --data and --images both say which images; keep one of them")
    path = data / "val.beton" if data and data.suffix != ".beton" else data
    evaluation = evaluate.evaluate(open_trained(run, stage), path, folder=images, out=out)
    print_line(to_json(evaluation) if as_json else evaluate.table(evaluation))


@command()
def export(
    run: RunDir,
    stage: StageName,
    to: Annotated[Path, Option(help="Folder for the files: new, empty, or of an export of the same weights.")],
    formats: Annotated[
        str | None,
        Option(
            "--format",
            help="Of pt2, onnx, onnx-int8, openvino, openvino-int8, litert, litert-int8, executorch and timm, with "
            "commas between them; default: the first three. model.safetensors, the weights, always comes along.",
        ),
    ] = None,
    batch: Annotated[int | None, Option(help="Images that the files take at once; default: any number.", min=1)] = None,
    opset: Annotated[int | None, Option(help="Of the ONNX files; default: the exporter's own.", min=18, max=25)] = None,
    symmetric: Annotated[bool, Option("--symmetric", help="8-bit ONNX and OpenVINO without zero points.")] = False,
    converter: Annotated[
        list[str] | None,
        Option(help="FORMAT=PYTHON, if another environment has its packages: litert=~/litert/bin/python."),
    ] = None,
    images: Annotated[int | None, Option(help="Compare on N validation images; default: all.", min=1)] = None,
    data: Annotated[Path | None, Option(help="Encoded folder of the same classes; default: the run's.")] = None,
    as_json: Json = False,
) -> None:
    """Write a finished network in formats of other programs; compare each with PyTorch on all images, and time it.

    Where the run's data are not there and --data is not given, files are compared on noise, and int8 is left out.

    Example: `gowide export runs/demo distill --to exports/demo --format onnx,openvino,openvino-int8`
    """
    from gowide_dist.export.compare import table
    from gowide_dist.export.folder import export
    from gowide_dist.export.formats import Request, parse_converters, parse_formats
    from gowide_dist.insight.trained import open_trained
    from gowide_dist.stop import raise_on_sigterm

    raise_on_sigterm()
    converters = parse_converters(converter or [])
    request = Request(parse_formats(formats), opset, batch, symmetric, images, converters)
    report = export(open_trained(run, stage), to, request, data)
    print_line(to_json(report) if as_json else table(report))


@command()
def report(
    runs: Annotated[list[Path], Argument(help="Run directories, finished or not.", metavar="RUN...")],
    out: Annotated[Path | None, Option(help="Folder to write to; default: report/ of the first run.")] = None,
    measure: Annotated[bool, Option(help="Latency, dead channels, agreement with teacher: once per network.")] = True,
    seeds: Seeds = None,
    as_json: Json = False,
) -> None:
    """Print the results of a run, and write report.html, a page with all plots, and CSV and PNG files beside it.

    For several runs, write runs.html: mean and standard deviation over runs that differ only in their seed, and the
    gain of each stage over the baseline.

    Example: `gowide report runs/fashion_mnist runs/fashion_mnist-1`
    """
    from gowide_dist.insight.report import report

    all_runs = [each for path in runs for each in runs_of_seeds(Run(path), seeds_of(seeds))]
    text, data = report(all_runs, measure=measure, out=out)
    print_line(to_json(data) if as_json else text)


@command()
def doctor(
    runs: Runs = Path("runs"),
    cluster: Annotated[Path | None, Option(help="A cluster profile to check.")] = None,
    as_json: Json = False,
) -> None:
    """Check this machine, and say how to fix each problem: packages, FFCV, JPEGs, cores, GPUs, Slurm, disk.

    Ends with status 1 if anything is bad. Takes up to a minute.

    Example: `gowide doctor --cluster slurm/clusters/gpu8.yaml`
    """
    from gowide_dist.insight.doctor import BAD, check_machine

    findings = []
    for finding in check_machine(runs, cluster):
        findings.append(finding)
        if not as_json:
            print_line(str(finding))
    if as_json:
        print_line(to_json([finding._asdict() for finding in findings]))
    if any(finding.state == BAD for finding in findings):
        raise typer.Exit(1)


def print_line(text: str) -> None:
    """Print to stdout, without rich's markup and line breaks."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the command of `sys.argv`: an error that the user may see is one line on stderr."""
    write_text_only()
    line, status = "", 2
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # `__main__` has set it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = app(prog_name="gowide", standalone_mode=False) or 0
        if status == 130:  # typer's, after Ctrl-C
            line = "stopped" + (
                "; run the same command again to resume" if {"run", "encode"} & {*sys.argv[1:2]} else ""
            )
    except TyperException as error:  # wrong usage; without arguments the help is printed, and there is no message
        if message := error.format_message().replace("Value error, ", "").rstrip("."):
            command = getattr(getattr(error, "ctx", None), "command_path", "gowide")
            line = f"{message}; see `{command} --help`"
    except UserError as error:
        line = str(error)
    except InternalError as error:
        line, status = str(error), 1
    except (OSError, ImportError) as error:
        if not (line := fixable(error) or ""):
            raise
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient Ctrl-C changes neither line nor status any more
    if line:
        sys.stderr.write(f"gowide: {line}\n")
    sys.exit(status)
