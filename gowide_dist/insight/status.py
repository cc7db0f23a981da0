"""Where a run stands: its stages, their jobs, how far they are. Light: reads small files, asks squeue and sacct."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gowide_dist.data.info import check_split
from gowide_dist.errors import RunError, UserError
from gowide_dist.launch.local import read_error
from gowide_dist.launch.queue import JobState, cancel, newest_jobs, read_jobs
from gowide_dist.launch.slurm import log_file, start_of
from gowide_dist.prepare import Prepared
from gowide_dist.progress import clock
from gowide_dist.recipe import Instance, Recipe, load_recipe
from gowide_dist.run import Done, Run, StageDir, read_metrics

FOLLOW_EVERY_S = 0.5
LOOK_AT_QUEUE_EVERY_S = 5.0


@dataclass(frozen=True)
class StageStatus:
    """One stage instance. `state`: done, running, queued, failed, cancelled, stopped, or absent (not begun)."""

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
    ids = {key: submitted[-1] for key, submitted in read_jobs(run.slurm).items()}
    finished = run.finished(recipe)
    rows = [
        _status(instance, recipe, run, finished.get(key), ids.get(key), jobs.get(key))
        for key, instance in recipe.instances.items()
    ]
    gone = {key: job for key, job in jobs.items() if key not in recipe.instances and (job.is_waiting or job.is_running)}
    return rows + [
        StageStatus(
            key, "queued" if job.is_waiting else "running", job.job_id, job.nodes or None, restarts=job.restarts,
            note="the recipe no longer has it",
        )
        for key, job in gone.items()
    ]  # fmt: skip


def _status(
    instance: Instance, recipe: Recipe, run: Run, done: Done | None, job_id: str | None, job: JobState | None
) -> StageStatus:
    place = run.stage(instance.key)
    common: dict[str, Any] = {"stage": instance.key, "job": job_id, "restarts": job.restarts if job else None}
    if done:
        return StageStatus(**common, state="done", step=done.steps, steps=done.steps, top1=done.top1)
    if place.done:
        return StageStatus(**common, state="absent", note="its folder holds the result of another recipe")
    common |= _progress(instance, recipe, place)
    if job and (job.is_running or job.is_leaving):
        return StageStatus(**common, state="running", where=job.nodes, note=job.state.lower() * job.is_leaving)
    if (writer := _writer(place)) and not (job and job.is_waiting):
        return StageStatus(**common, state="running", where=writer)
    del common["images_per_s"], common["seconds_left"]
    if job is None:
        return StageStatus(**common, state="stopped" if common["step"] else "absent")
    if job.is_waiting:
        starts = f", starts {job.starts}" if job.starts else ""
        return StageStatus(**common, state="queued", note=f"{job.reason or job.state}{starts}")
    if job.state == "CANCELLED":
        return StageStatus(**common, state="cancelled", where=job.nodes)
    return StageStatus(**common, state="failed", where=job.nodes, note=_why(run, job))


def _progress(instance: Instance, recipe: Recipe, place: StageDir) -> dict[str, Any]:
    """Steps done and to do, images per second and seconds left of the training alone."""
    try:
        steps = check_split(recipe.data.train).samples // recipe.batch_size * instance.stage.epochs
    except UserError:
        steps = None
    rows = [row for row in read_metrics(place.metrics) if row["kind"] == "train"]
    step = rows[-1]["step"] if rows else 0
    rate = rows[-1]["images_per_s"] if rows else None
    left = (steps - step) * recipe.batch_size / rate if steps and rate else None
    return {"step": step, "steps": steps, "images_per_s": rate, "seconds_left": left}


def _writer(place: StageDir) -> str | None:
    """Who is training without Slurm, if that can be told."""
    try:
        return place.writer()
    except RunError:
        return None


def _why(run: Run, job: JobState) -> str:
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


def table(rows: list[StageStatus]) -> str:
    """The stages as lines of text."""
    head = ("stage", "state", "job", "where", "step", "images/s", "left", "restarts", "")
    lines = [head]
    for row in rows:
        note = f"top-1 {row.top1:.2f} %" if row.top1 is not None else row.note
        step = f"{row.step:,}/{row.steps:,}" if row.step is not None and row.steps else ""
        rate = f"{row.images_per_s:,.0f}" if row.images_per_s else ""
        left = clock(row.seconds_left) if row.seconds_left is not None else ""
        restarts = str(row.restarts) if row.restarts else ""
        lines.append((row.stage, row.state, row.job or "", row.where or "", step, rate, left, restarts, note))
    used = [index for index in range(len(head)) if any(line[index] for line in lines[1:])]
    widths = {index: max(len(line[index]) for line in lines) for index in used}
    return "\n".join("  ".join(line[index].ljust(widths[index]) for index in used).rstrip() for line in lines)


def as_json(rows: list[StageStatus]) -> list[dict[str, Any]]:
    """The stages as data."""
    return [asdict(row) for row in rows]


def graph(prepared: Prepared, ids: Mapping[str, str]) -> str:
    """What was submitted: every selected instance with its job, what it waits for, and its log."""
    lines = []
    for key, instance in prepared.selected.items():
        if key not in ids:
            lines.append((key, "done", "", ""))
            continue
        after = [parent for parent in instance.parents if parent in ids]
        waits = f"after {', '.join(after)}" if after else ""
        lines.append((key, f"job {ids[key]}", waits, str(log_file(prepared.run.slurm, ids[key]))))
    widths = [max(len(line[index]) for line in lines) for index in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in lines
    )


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
    position, looked = 0, time.monotonic()
    is_over = not follow
    while True:
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(position)
                if text := file.read():
                    yield text
                position = file.tell()
        if is_over:
            return
        time.sleep(FOLLOW_EVERY_S)
        if time.monotonic() - looked > LOOK_AT_QUEUE_EVERY_S:
            looked = time.monotonic()
            job = newest_jobs(run.slurm, recipe.name).get(keys[0])
            is_over = job is None or not (job.is_waiting or job.is_running or job.is_leaving)


def cancel_run(run: Run) -> list[str]:
    """Cancel all jobs of a run that are queued or running; their names. Raises UserError if Slurm does not answer."""
    jobs = newest_jobs(run.slurm, load_recipe(run.recipe_path).name)
    active = {key: job.job_id for key, job in jobs.items() if job.is_waiting or job.is_running}
    if active:
        cancel(active.values())
    return [f"{key}  job {job_id}" for key, job_id in active.items()]
