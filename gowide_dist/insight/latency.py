"""What only the finished networks tell: latency on this machine, dead channels, agreement with the teacher."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, Field, ValidationError

from gowide_dist.errors import UserError
from gowide_dist.files import write_atomically
from gowide_dist.progress import say
from gowide_dist.recipe import Instance, Recipe
from gowide_dist.run import Done, Run

if TYPE_CHECKING:
    from torch import Tensor

Images = TypeVar("Images")  # a Tensor, or a NumPy array for a runtime that takes these

FILE_NAME = "measured.json"
WARM_UPS, MIN_CALLS, MAX_CALLS = 2, 3, 50


def latency_ms(forward: Callable[[Images], object], images: Images, seconds: float = 1.0) -> float:
    """Median ms of `forward(images)` after warm-up, over 3 to 50 calls that take about `seconds` together.

    Waits for CUDA if the images lie there. The caller chooses eval and inference mode, threads, memory format.
    """

    def call_s() -> float:
        start = time.perf_counter()
        forward(images)
        if getattr(images, "is_cuda", False):
            import torch

            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(WARM_UPS):
        call_s()
    calls: list[float] = []
    while len(calls) < MIN_CALLS or (sum(calls) < seconds and len(calls) < MAX_CALLS):
        calls.append(call_s())
    return 1000 * median(calls)


class Latency(BaseModel):
    """Of a forward pass in PyTorch, normalised float32 images to logits, in ms."""

    batch_1_ms: float
    batch_64_ms: float
    where: str  # machine, device, threads


class Measurements(BaseModel):
    """What is known of finished networks, by their weights' SHA-256; kept in the run's report/.

    dead_channels: of every block, how many channels of its output are zero for all validation images. As a ReLU that
    answers zero passes no gradient on, hardly any of them comes back.
    """

    latency: dict[str, Latency] = {}
    dead_channels: dict[str, list[int]] = {}
    agreement: dict[str, float] = {}  # % of the validation images in the same class; "STUDENT TEACHER"
    errors: dict[str, str] = Field(default_factory=dict, exclude=True)  # of instances that could not be measured

    def agreement_of(self, student: Done, teacher: Done) -> float | None:
        return self.agreement.get(f"{student.model_sha256} {teacher.model_sha256}")


def read_measurements(run: Run) -> Measurements:
    """What was measured before; a damaged file is measured again."""
    try:
        return Measurements.model_validate_json((run.report / FILE_NAME).read_bytes())
    except (OSError, ValidationError):
        return Measurements()


def teacher_of(instance: Instance, recipe: Recipe) -> str | None:
    """The teacher of this instance or of what it started from; without one, the recipe's only teacher."""
    teachers = {other.teacher for other in recipe.instances.values() if other.teacher}
    start: Instance | None = instance
    while start:
        if start.teacher:
            return start.teacher
        start = recipe.instances[start.init] if start.init else None
    return next(iter(teachers)) if len(teachers) == 1 and instance.key not in teachers else None


def measure_networks(run: Run, recipe: Recipe) -> Measurements:
    """Measure what is missing of the finished networks, keep it, and return all that is known."""
    known = read_measurements(run)
    before = known.model_copy(deep=True)
    done = run.finished(recipe)

    @cache
    def predictions(key: str) -> Tensor:
        say(f"{key}  running it on all validation images")
        classes, known.dead_channels[done[key].model_sha256] = _predict(run, key)
        return classes

    for key, student in done.items():
        try:
            if student.model_sha256 not in known.latency:
                say(f"{key}  measuring its latency")
                known.latency[student.model_sha256] = _latency(run, key, recipe.data.resolution)
            if student.model_sha256 not in known.dead_channels:
                predictions(key)
            teacher = teacher_of(recipe.instances[key], recipe)
            if teacher in done and known.agreement_of(student, done[teacher]) is None:
                same = (predictions(key) == predictions(teacher)).double().mean()
                known.agreement[f"{student.model_sha256} {done[teacher].model_sha256}"] = round(100 * float(same), 4)
        except UserError as error:
            known.errors[key] = str(error)
    if known != before:
        try:
            run.report.mkdir(exist_ok=True)
            write_atomically(run.report / FILE_NAME, known.model_dump_json(indent=2) + "\n")
        except OSError as error:
            say(f"{run.report}: cannot be written ({error.strerror}), so what was measured is not kept")
    return known


def _latency(run: Run, key: str, side: int) -> Latency:
    import torch

    from gowide_dist.pipeline import load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_model(run.path, *key.split("/")).to(device).to(memory_format=torch.channels_last)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    images = torch.rand(64, 3, side, side, device=device).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        one, many = (round(latency_ms(network, images[:size]), 4) for size in (1, 64))
    return Latency(batch_1_ms=one, batch_64_ms=many, where=f"{platform.node()}, {name}")


def _predict(run: Run, key: str) -> tuple[Tensor, list[int]]:
    """The class of every validation image, [N] int64; and the number of dead channels of every block."""
    import torch

    from gowide_dist.insight.trained import Classifier, open_trained

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_trained(run.path, key)
    network = trained.network()
    classifier = Classifier(network, trained.info).to(device).to(memory_format=torch.channels_last)
    classes = []
    peaks = [torch.zeros(channels, device=device) for channels in network.architecture.block_channels]
    with closing(trained.validation_images(trained.recipe.data.val)) as images, torch.inference_mode():
        for batch in images.batches():
            blocks = classifier.blocks(batch.images.to(device))
            classes.append(network.head(blocks[-1]).argmax(dim=1).cpu())
            peaks = [torch.maximum(peak, x.amax((0, 2, 3))) for peak, x in zip(peaks, blocks, strict=True)]
    return torch.cat(classes), [int((peak == 0).sum()) for peak in peaks]
