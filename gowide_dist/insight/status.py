"""Where a run stands: its stages, their jobs, their progress; from small files, squeue and sacct, without torch."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gowide_dist.data.info import check_split
from gowide_dist.errors import RunError, UserError
from gowide_dist.insight.text import table
from gowide_dist.launch.chain import LOGITS, Action, Chain
from gowide_dist.launch.code import has_changed
from gowide_dist.launch.local import read_error
from gowide_dist.launch.queue import JobState, SlurmError, cancel, is_followed, newest_jobs, read_jobs
from gowide_dist.launch.slurm import is_refused, log_file, start_of
from gowide_dist.prepare import Prepared
from gowide_dist.progress import clock
from gowide_dist.recipe import Recipe
from gowide_dist.run import Run, key_of, read_metrics

CODE_HAS_CHANGED = "runs the package as it was submitted; it has changed since"
FOLLOW_EVERY_S = 0.5
ASK_SLURM_EVERY = 10  # of these
# States in which Slurm leaves a job that it has ended itself, and has not queued again.
_INTERRUPTED = {
    "PREEMPTED": "another job took its nodes",
    "TIMEOUT": "its time ended before it could save",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "its deadline came",
    "REVOKED": "another cluster took it",
}


@dataclass
class StageStatus:
    """Where a stage instance stands."""

    stage: str
    state: str = "absent"  # not started; or done, running, queued, failed, cancelled, stopped
    job: str | None = None
    where: str | None = None
    step: int | None = None
    steps: int | None = None  # of the whole stage
    images_per_s: float | None = None
    seconds_left: float | None = None  # of its training, without evaluations
    restarts: int | None = None
    top1: float | None = None
    note: str = ""


def status(run: Run) -> list[StageStatus]:
    """The stages of a run, parents first. Raises UserError if there is no run or Slurm does not answer."""
    recipe = run.recipe()
    jobs, ids, finished = newest_jobs(run.slurm, recipe.name), read_jobs(run.slurm), run.finished(recipe)
    rows = []
    for key in {**recipe.instances, **jobs}:
        job = jobs.get(key)
        row = StageStatus(key, job=ids[key][-1] if key in ids else None)
        if job:
            row.restarts = job.restarts + sum(is_followed(run.slurm, job_id) for job_id in ids[key])
        if done := finished.get(key):
            row.state, row.step, row.steps, row.top1 = "done", done.steps, done.steps, done.top1
        elif key in recipe.instances:
            _add_state(row, run, recipe, job)
        elif job and not _add_other_job(row, run, job):
            continue
        if row.state in ("queued", "running") and job and has_changed(run.slurm, job.job_id):
            row.note = f"{row.note}; {CODE_HAS_CHANGED}".removeprefix("; ")
        rows.append(row)
    return rows


def _add_other_job(row: StageStatus, run: Run, job: JobState) -> bool:
    """The state of a job that trains no instance of the recipe; False if there is nothing to say of it."""
    stores_logits = row.stage.startswith(f"{LOGITS}/")
    row.where = job.nodes or None
    if job.is_waiting or job.is_running:
        row.state = "queued" if job.is_waiting else "running"
        row.note = "stores the teacher's logits for several stages" if stores_logits else "no longer in the recipe"
        return True
    if stores_logits and job.state == "FAILED":
        row.state, row.note = "failed", _failure(run, job)
        return True
    return False


def _add_state(row: StageStatus, run: Run, recipe: Recipe, job: JobState | None) -> None:
    """Where an unfinished instance stands: by its metrics, the number of training images, its job and its lock."""
    stage_dir, writer = run.stage(row.stage), None
    if stage_dir.done:
        row.note = "its folder holds a result of another recipe or of other data"
        return
    with contextlib.suppress(UserError):
        epochs = recipe.instances[row.stage].stage.epochs
        row.steps = check_split(recipe.data.train).samples // recipe.batch_size * epochs
    lines = [line for line in read_metrics(stage_dir.metrics) if line["kind"] == "train"]
    row.step = lines[-1]["step"] if lines else 0
    if job is None or job.is_over:
        with contextlib.suppress(RunError):  # a file system without locks does not tell who trains without Slurm
            writer = stage_dir.writer()
    row.where = writer or (job.nodes or None if job else None)
    if writer or (job and (job.is_running or job.is_leaving)):
        row.state, row.note = "running", job.state.lower() if job and job.is_leaving else ""
        row.images_per_s = lines[-1]["images_per_s"] if row.step > 1 else None  # the first step's tells nothing
        if row.steps and row.images_per_s:
            row.seconds_left = (row.steps - row.step) * recipe.batch_size / row.images_per_s
    elif job is None:
        row.state = "stopped" if row.step else "absent"
    elif job.is_waiting:
        starts = f", starts {job.starts}" if job.starts else ""
        row.state, row.note = "queued", f"{job.reason or job.state}{starts}"
    elif job.state == "CANCELLED":
        row.state = "cancelled"
    elif interruption := _interruption(run, row.stage, job):
        row.state, row.note = "stopped", interruption
    else:
        row.state, row.note = "failed", _failure(run, job)


def _interruption(run: Run, key: str, job: JobState) -> str | None:
    """What ended a job from outside, and how it goes on; None if its processes failed."""
    if is_refused(run.slurm, job.job_id):
        what = "Slurm refuses to queue its job again"
    elif job.state in _INTERRUPTED:
        what = f"{job.state}: {_INTERRUPTED[job.state]}"
    else:
        return None
    step = run.stage(key).saved_step
    saved = "nothing is saved yet, `gowide submit` begins it again"
    return f"{what}; {saved if step is None else f'saved at step {step:,}, `gowide submit` continues there'}"


def _failure(run: Run, job: JobState) -> str:
    """Why a job failed: what its processes left, else Slurm's word and the last error in its log."""
    for path in sorted(run.slurm.glob(f"{job.job_id}_*_error.json"), key=start_of, reverse=True):
        if line := read_error(path):
            return line
    log = log_file(run.slurm, job.job_id)
    if not log.exists():
        return f"{job.state}: {job.nodes or 'its node'} could not write {log}; is {run.path} on a shared file system?"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception)\b.*:", line)]
    return f"{job.state}: {[*lines[-1:], *errors][-1] if lines else 'its log is empty'}"


def status_table(rows: Iterable[StageStatus]) -> str:
    """The stages as text."""
    head = ("stage", "state", "job", "where", "step", "images/s", "left", "restarts", "")
    cells = []
    for row in rows:
        step = f"{row.step:,}/{row.steps:,}" if row.step is not None and row.steps else ""
        rate = f"{row.images_per_s:,.0f}" if row.images_per_s else ""
        left = clock(row.seconds_left) if row.seconds_left is not None else ""
        note = f"top-1 {row.top1:.2f} %" if row.top1 is not None else row.note
        job, where, restarts = row.job or "", row.where or "", str(row.restarts or "")
        cells.append((row.stage, row.state, job, where, step, rate, left, restarts, note))
    return table(head, cells, left=(0, 1, 2, 3, 8))


def submitted(prepared: Prepared, chain: Chain, ids: Mapping[str, str]) -> str:
    """A line for every selected instance: its job, the instances that it waits for, and its log."""
    lines = []
    for key in {**prepared.selected, **dict.fromkeys(job.key for job in chain.jobs if job.key.startswith(LOGITS))}:
        planned = chain.planned.get(key)
        if key not in ids or planned is None:
            lines.append(f"{key}  done")
            continue
        if planned.action is Action.SHARE:
            lines.append(f"{key}  job {ids[key]} of another seed")
            continue
        needed = planned.job.parents if planned.job else prepared.selected[key].parents
        parents = ", ".join(parent for parent in needed if parent in ids and ids[parent] != ids[key])
        after = f"  after {parents}" if parents else ""
        lines.append(f"{key}  job {ids[key]}{after}  {log_file(prepared.run.slurm, ids[key])}")
    return "\n".join(lines)


def logs(run: Run, stage: str, *, follow: bool = False, rank: int = 0) -> Iterator[str]:
    """What a stage's newest job prints, with `follow` until it is over. Raises UserError if it has printed nothing."""
    recipe = run.recipe()
    ids = read_jobs(run.slurm)
    if not ids:
        raise RunError(f"{run.path}: no stage of it was submitted to Slurm; `gowide run` prints where it runs")
    key = key_of(stage, ids, run.path)
    job_id = ids[key][-1]
    path = log_file(run.slurm, job_id, rank)
    if not path.exists() and not follow:
        raise RunError(f"{path}: job {job_id} of {key} has not printed anything; `gowide status` says where it is")
    position = 0
    for turn in itertools.count(1):
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(position)
                yield file.read()
                position = file.tell()
        if not follow:
            return
        time.sleep(FOLLOW_EVERY_S)
        if turn % ASK_SLURM_EVERY == 0:
            try:
                job = newest_jobs(run.slurm, recipe.name).get(key)
            except SlurmError:
                continue  # a busy controller answers later
            follow = job is not None and not job.is_over  # over: what it has printed since the last turn is left


def cancel_runs(runs: Sequence[Run]) -> list[str]:
    """Cancel all jobs of runs that are queued or running; their names. Raises UserError if Slurm does not answer."""
    active: dict[str, str] = {}
    for run in runs:
        jobs, prefix = newest_jobs(run.slurm, run.recipe().name), f"{run.path}: " if len(runs) > 1 else ""
        active |= {f"{prefix}{key}": job.job_id for key, job in jobs.items() if job.is_waiting or job.is_running}
    if active:
        cancel(active.values())
    return [f"{name}  job {job_id}" for name, job_id in active.items()]
