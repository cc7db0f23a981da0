"""Measurements of finished networks: latency on this machine, dead channels, agreement with the teacher."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from statistics import median
from timeit import Timer
from typing import Any

import torch
from torch import Tensor

from gowide_dist.errors import UserError
from gowide_dist.files import write_atomically
from gowide_dist.insight.results import MEASURED_FILE, Row, read_measured, teacher_of
from gowide_dist.insight.trained import Classifier, open_trained, predict
from gowide_dist.networks.quantised import unrounded
from gowide_dist.pipeline import load_model
from gowide_dist.progress import say
from gowide_dist.recipe import Recipe
from gowide_dist.run import Run


def latency_ms(forward: Callable[[Tensor], Any], images: Tensor, seconds: float = 1.0) -> float:
    """Median ms of `forward(images)` after warm-up, over 3 to 50 calls that take about `seconds` together.

    The caller chooses eval and inference mode, threads, memory format; on a GPU `forward` waits for its result.
    """
    # Not torch's benchmark timer: its import warns on stderr where there is a CUDA toolkit and no GPU.
    timer, calls = Timer(lambda: forward(images)), list[float]()
    timer.timeit(2)
    while len(calls) < 3 or (sum(calls) < seconds and len(calls) < 50):
        calls.append(timer.timeit(1))
    return 1000 * median(calls)


def measure_networks(run: Run, recipe: Recipe) -> dict[str, Row]:
    """Measure the finished networks that are not measured yet, keep it in the run, and return all measurements."""
    known, before = read_measured(run), read_measured(run)
    done = run.finished(recipe)
    predict_once = cache(partial(_predict, run))
    for key, student in done.items():
        teacher = done.get(teacher_of(recipe.instances[key], recipe) or "")
        measured = known.get(student.model_sha256, {"error": "not measured yet"})
        if "error" not in measured and (not teacher or teacher.model_sha256 in measured["agreement"]):
            continue
        known[student.model_sha256] = measured = {"agreement": {}}
        try:
            say(f"{key}  measuring its latency")
            measured |= _latency(run, key, recipe.data.resolution)
            classes, measured["dead_channels"] = predict_once(key)
            if teacher:
                same = classes == predict_once(f"{teacher.stage}/{teacher.network}")[0]
                measured["agreement"][teacher.model_sha256] = round(100 * float(same.double().mean()), 4)
        except UserError as error:
            measured["error"] = str(error)
    if known != before:
        try:
            run.report.mkdir(exist_ok=True)
            write_atomically(run.report / MEASURED_FILE, json.dumps(known, indent=2) + "\n")
        except OSError as error:
            say(f"{run.report}: cannot be written ({error.strerror}), so the measurements are not kept")
    return known


def _latency(run: Run, key: str, side: int) -> Row:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = unrounded(load_model(run.path, *key.split("/"))).to(device).to(memory_format=torch.channels_last)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    images = torch.rand(64, 3, side, side, device=device).to(memory_format=torch.channels_last)
    with torch.inference_mode():  # to the CPU: waits for a GPU
        times = {size: latency_ms(lambda batch: network(batch)[0].cpu(), images[:size]) for size in (1, 64)}
    latencies = {f"latency_ms_{size}": round(ms, 4) for size, ms in times.items()}
    return {**latencies, "where": f"{platform.node()}, {name}"}


def _predict(run: Run, key: str) -> tuple[Tensor, list[int]]:
    """The class of every validation image, [N] int64; and the number of dead channels of every block."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_trained(run.path, key)
    classifier = Classifier(trained.network(), trained.preprocessing).to(device).to(memory_format=torch.channels_last)
    peaks: dict[int, Tensor] = {}

    def forward(images: Tensor) -> Tensor:
        logits, blocks = classifier.outputs(images.to(device))
        for index, x in enumerate(blocks):
            peak = x.abs().amax((0, 2, 3))
            peaks[index] = torch.maximum(peaks.get(index, peak), peak)
        return logits

    with closing(trained.validation_images(trained.recipe.data.val)) as images:
        logits, _ = predict(forward, images, f"{key} on the validation images")
    return logits.argmax(dim=1), [int((peak == 0).sum()) for peak in peaks.values()]
