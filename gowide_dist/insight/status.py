"""Where a run stands: its stages, their jobs, their progress; from small files, squeue and sacct, without torch."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from gowide_dist.data.info import check_split
from gowide_dist.errors import RunError, UserError
from gowide_dist.insight.text import table
from gowide_dist.launch.local import read_error
from gowide_dist.launch.queue import JobState, cancel, newest_jobs, read_jobs
from gowide_dist.launch.slurm import log_file, start_of
from gowide_dist.prepare import Prepared
from gowide_dist.progress import clock
from gowide_dist.recipe import Recipe, load_recipe
from gowide_dist.run import Done, Run, StageDir, read_metrics

FOLLOW_EVERY_S = 0.5
ASK_SLURM_EVERY_S = 5.0


@dataclass(frozen=True)
class StageStatus:
    """Where a stage instance stands. `state`: done, running, queued, failed, cancelled, stopped or absent (not begun).

    `steps`: of the whole stage. `seconds_left`: of its training, without evaluations.
    """

    stage: str
    state: str
    job: str | None = None
    where: str | None = None
    step: int | None = None
    steps: int | None = None
    images_per_s: float | None = None
    seconds_left: float | None = None
    restarts: int | None = None
    top1: float | None = None
    note: str = ""


def status(run: Run) -> list[StageStatus]:
    """The stages of a run, parents first. Raises UserError if there is no run or Slurm does not answer."""
    recipe = load_recipe(run.recipe_path)
    jobs = newest_jobs(run.slurm, recipe.name)
    ids = read_jobs(run.slurm)
    finished = run.finished(recipe)
    rows = []
    for key in {**recipe.instances, **jobs}:
        job = jobs.get(key)
        row = StageStatus(key, "absent", ids[key][-1] if key in ids else None, restarts=job.restarts if job else None)
        if key in recipe.instances:
            rows.append(_status(row, run, recipe, finished.get(key), job))
        elif job and (job.is_waiting or job.is_running):
            state = "queued" if job.is_waiting else "running"
            rows.append(replace(row, state=state, where=job.nodes or None, note="the recipe no longer has it"))
    return rows


def _status(row: StageStatus, run: Run, recipe: Recipe, done: Done | None, job: JobState | None) -> StageStatus:
    """The row, of which the instance and its job are known, with all the rest."""
    stage_dir = run.stage(row.stage)
    if done:
        return replace(row, state="done", step=done.steps, steps=done.steps, top1=done.top1)
    if stage_dir.done:
        return replace(row, note="its folder holds the result of another recipe")
    running = _running(row, recipe, stage_dir)
    row = replace(row, step=running.step, steps=running.steps)
    if job and (job.is_running or job.is_leaving):
        return replace(running, where=job.nodes, note=job.state.lower() if job.is_leaving else "")
    if not (job and job.is_waiting):
        with contextlib.suppress(RunError):  # a file system without locks does not tell who trains without Slurm
            if writer := stage_dir.writer():
                return replace(running, where=writer)
    if job is None:
        return replace(row, state="stopped" if row.step else "absent")
    if job.is_waiting:
        starts = f", starts {job.starts}" if job.starts else ""
        return replace(row, state="queued", note=f"{job.reason or job.state}{starts}")
    if job.state == "CANCELLED":
        return replace(row, state="cancelled", where=job.nodes)
    return replace(row, state="failed", where=job.nodes, note=_failure(run, job))


def _running(row: StageStatus, recipe: Recipe, stage_dir: StageDir) -> StageStatus:
    """The row with its progress, from the metrics and the number of training images."""
    try:
        steps = check_split(recipe.data.train).samples // recipe.batch_size * recipe.instances[row.stage].stage.epochs
    except UserError:
        steps = None
    lines = [line for line in read_metrics(stage_dir.metrics) if line["kind"] == "train"]
    step = lines[-1]["step"] if lines else 0
    rate = lines[-1]["images_per_s"] if lines else None
    left = (steps - step) * recipe.batch_size / rate if steps and rate else None
    return replace(row, state="running", step=step, steps=steps, images_per_s=rate, seconds_left=left)


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
        cells.append(
            (row.stage, row.state, row.job or "", row.where or "", step, rate, left, str(row.restarts or ""), note)
        )
    return table(head, cells, left=(0, 1, 2, 3, 8))


def submitted_table(prepared: Prepared, ids: Mapping[str, str]) -> str:
    """Every selected instance with its job, the instances that it waits for, and its log."""
    rows = [[key, "done", "", ""] for key in prepared.selected]
    for row, instance in zip(rows, prepared.selected.values(), strict=True):
        if job_id := ids.get(instance.key):
            parents = ", ".join(parent for parent in instance.parents if parent in ids)
            row[1:] = job_id, parents, str(log_file(prepared.run.slurm, job_id))
    return table(("stage", "job", "after", "log"), rows, left=range(4))


def logs(run: Run, stage: str, *, follow: bool = False, rank: int = 0) -> Iterator[str]:
    """What a stage's newest job prints; with `follow` as it prints it, until the job is over.

    Raises UserError if the stage has no job or it has not printed anything.
    """
    recipe = load_recipe(run.recipe_path)
    ids = read_jobs(run.slurm)
    keys = [key for key in ids if stage in (key, key.partition("/")[0])]
    if len(keys) != 1:
        raise RunError(f"{run.path}: name a stage that was submitted: {', '.join(ids) or 'there is none'}")
    job_id = ids[keys[0]][-1]
    path = log_file(run.slurm, job_id, rank)
    if not path.exists() and not follow:
        raise RunError(f"{path}: job {job_id} of {keys[0]} has not printed anything; `gowide status` says where it is")
    position, asked_at, is_over = 0, time.monotonic(), not follow
    while True:
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(position)
                yield file.read()
                position = file.tell()
        if is_over:
            return
        time.sleep(FOLLOW_EVERY_S)
        if time.monotonic() - asked_at > ASK_SLURM_EVERY_S:
            asked_at = time.monotonic()
            job = newest_jobs(run.slurm, recipe.name).get(keys[0])
            is_over = job is None or not (job.is_waiting or job.is_running or job.is_leaving)


def cancel_run(run: Run) -> list[str]:
    """Cancel all jobs of a run that are queued or running; their names. Raises UserError if Slurm does not answer."""
    jobs = newest_jobs(run.slurm, load_recipe(run.recipe_path).name)
    active = {key: job.job_id for key, job in jobs.items() if job.is_waiting or job.is_running}
    if active:
        cancel(active.values())
    return [f"{key}  job {job_id}" for key, job_id in active.items()]
