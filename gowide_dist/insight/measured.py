"""What only the finished networks tell: latency here, dead channels, agreement with the teacher. Kept in report/."""

from __future__ import annotations

import platform
import time
from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from gowide_dist.errors import UserError, is_full
from gowide_dist.files import write_atomically
from gowide_dist.progress import say
from gowide_dist.recipe import Instance, Recipe
from gowide_dist.run import Done, Run

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "measured.json"
FEWEST_PASSES, MOST_PASSES, ENOUGH_S = 3, 30, 1.0


class Latency(BaseModel):
    """Median time of a forward pass, normalised float32 images to logits, in ms."""

    batch_1_ms: float
    batch_64_ms: float
    where: str  # machine, device, threads


class Measured(BaseModel):
    """By a model's SHA-256; agreement, in %, by both models'.

    dead_channels: of every block, how many channels of its output are zero for all validation images. As a ReLU that
    answers zero passes no gradient on, hardly any of them comes back.
    """

    latency: dict[str, Latency] = {}
    dead_channels: dict[str, list[int]] = {}
    agreement: dict[str, float] = {}
    why_not: dict[str, str] = Field(default_factory=dict, exclude=True)  # by instance, of what could not be measured

    def agreement_of(self, student: Done, teacher: Done) -> float | None:
        """In %, if it was measured."""
        return self.agreement.get(_pair(student, teacher))


def read_measured(run: Run) -> Measured:
    """What was measured before; a damaged file is as good as none."""
    try:
        return Measured.model_validate_json((run.report / FILE_NAME).read_bytes())
    except (OSError, ValidationError):
        return Measured()


def teacher_of(instance: Instance, recipe: Recipe) -> str | None:
    """The instance that taught this one, or what it started from; for an untaught one the recipe's only teacher."""
    teachers = {other.teacher for other in recipe.instances.values() if other.teacher}
    start: Instance | None = instance
    while start:
        if start.teacher:
            return start.teacher
        start = recipe.instances[start.init] if start.init else None
    return next(iter(teachers)) if len(teachers) == 1 and instance.key not in teachers else None


def measure(run: Run, recipe: Recipe) -> Measured:
    """What is known of the finished networks, after measuring what was missing. What cannot be measured says why."""
    found = read_measured(run)
    done = run.finished(recipe)
    pairs = {key: teacher for key in done if (teacher := teacher_of(recipe.instances[key], recipe)) in done}
    before = found.model_copy(deep=True)
    for key in done:
        if done[key].model_sha256 not in found.latency:
            try:
                say(f"{key}  measuring its latency")
                found.latency[done[key].model_sha256] = _latency(run, key, recipe.data.resolution)
            except UserError as error:
                found.why_not[key] = str(error)
    answers: dict[str, _Answers] = {}

    def ask(key: str) -> Tensor:
        if key not in answers:
            say(f"{key}  asking it for all validation images")
            answers[key] = _ask(run, key)
            found.dead_channels[done[key].model_sha256] = answers[key].dead_channels
        return answers[key].classes

    for key in done:
        try:
            if done[key].model_sha256 not in found.dead_channels:
                ask(key)
            if key in pairs and found.agreement_of(done[key], done[pairs[key]]) is None:
                same = (ask(key) == ask(pairs[key])).double().mean()
                found.agreement[_pair(done[key], done[pairs[key]])] = round(100 * float(same), 4)
        except UserError as error:
            found.why_not[key] = str(error)
    if found != before:
        try:
            run.report.mkdir(exist_ok=True)
            write_atomically(run.report / FILE_NAME, found.model_dump_json(indent=2) + "\n")
        except OSError as error:
            if is_full(error):
                raise
            say(f"{run.report}: cannot be written ({error.strerror}), so what was measured is not kept")
    return found


def _latency(run: Run, key: str, side: int) -> Latency:
    import torch

    from gowide_dist.pipeline import load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_model(run.path, *key.split("/")).to(device).to(memory_format=torch.channels_last)

    def batch_ms(size: int) -> float:
        images = torch.rand(size, 3, side, side, device=device).to(memory_format=torch.channels_last)
        passes: list[float] = []
        with torch.inference_mode():
            network(images)
            while len(passes) < FEWEST_PASSES or (sum(passes) < ENOUGH_S and len(passes) < MOST_PASSES):
                start = time.perf_counter()
                network(images)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                passes.append(time.perf_counter() - start)
        return round(1000 * median(passes), 4)

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Latency(batch_1_ms=batch_ms(1), batch_64_ms=batch_ms(64), where=f"{platform.node()}, {name}")


class _Answers(NamedTuple):
    """What a network says of all validation images: the class of each, [N] int64; and see `Measured`."""

    classes: Tensor
    dead_channels: list[int]


def _ask(run: Run, key: str) -> _Answers:
    import torch

    from gowide_dist.insight.trained import Classifier, open_trained

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_trained(run.path, key)
    network = trained.network()
    classifier = Classifier(network, trained.info).to(device).to(memory_format=torch.channels_last)
    classes = []
    greatest = [torch.zeros(channels, device=device) for channels in network.architecture.block_channels]
    with closing(trained.validation_images(trained.recipe.data.val)) as images, torch.inference_mode():
        for batch in images.batches():
            blocks = classifier.blocks(batch.images.to(device))
            classes.append(network.head(blocks[-1]).argmax(dim=1).cpu())
            greatest = [torch.maximum(most, x.amax((0, 2, 3))) for most, x in zip(greatest, blocks, strict=True)]
    return _Answers(torch.cat(classes), [int((most == 0).sum()) for most in greatest])


def _pair(student: Done, teacher: Done) -> str:
    return f"{student.model_sha256} {teacher.model_sha256}"
