"""Every measurement once, on tiny data: that it works, and its keys."""

import json
import subprocess
import sys
from contextlib import closing

import pytest

from gowide_dist import load_recipe
from gowide_dist.data.encode import Options, encode
from gowide_dist.errors import UserError
from tests.bench.__main__ import as_text
from tests.bench.measure import choose, measure
from tests.bench.pairs import Effort, Figure, in_turns
from tests.bench.plain import PlainImages
from tests.bench.subject import inputs, open_subject
from tests.data.conftest import write_image_folder
from tests.fashion import chain, encode_part, write_job

LITTLE = Effort(pairs=2, seconds=0)
DETAILS = {
    "loop": ["bare_step_ms", "steps_per_pair"],
    "imitate": ["bottom_up", "images_and_epochs_per_block", "plain_in_memory"],
    "distill_stored": [
        "live_step_ms",
        "our_live_over_stored",
        "plain_in_memory",
        "plain_in_memory_step_ms",
        "plain_step_ms",
        "stored_step_ms",
        "teacher_flops_over_students",
    ],
    "checkpoint": [
        "cost_of_a_save_ms",
        "parameters",
        "save_in_the_foreground_ms",
        "standstill_of_a_save_ms",
        "step_ms",
    ],
    "students_together": [],
    "teacher": ["compile_seconds", "compiled", "not_compiled"],
}
NO_TEACHER = "stages={only: {train: thin, objective: labels, epochs: 1, optim: {lr: 0.1}}}"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    return write_job(root, chain(encode_part(root, 240, 60), log_every_steps=2))


@pytest.fixture(scope="module")
def figures(job):
    return dict(measure(load_recipe(job), list(DETAILS), LITTLE))


@pytest.mark.parametrize("name", DETAILS)
def test_figures_of_training(figures, name):
    result = figures[name]
    assert json.loads(json.dumps(result)) == result
    assert sorted(set(result) - {"what", "target", "ratio", "low", "high", "pairs"}) == DETAILS[name]
    assert result["low"] <= result["ratio"] <= result["high"]
    assert result["pairs"] == 2
    assert name == "checkpoint" or result["low"] > 0  # a save that costs nothing is noise around 0
    assert as_text(name, result).startswith(f"{name}  ")


@pytest.mark.parametrize("jpg_share, close", [(0.0, 1e-5), (1.0, 0.03)])  # JPEG: FFCV's fast transform, Pillow's exact
def test_the_plain_way_reads_the_same_images(tmp_path, jpg_share, close):
    write_image_folder(tmp_path / "images", 8, 8, most_px=40)
    encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(jpg_share=jpg_share, workers=1))
    plain = chain(tmp_path / "out", batch_size=8)
    plain["data"] |= {"resolution": 40, "augment": {}}
    recipe = load_recipe(write_job(tmp_path, plain))
    with open_subject(recipe, tmp_path, LITTLE) as subject, closing(subject.data.train(0)) as loader:
        batch = next(loader.batches())
        plain_images = PlainImages(recipe, subject.data.info.mean, subject.data.info.std)
        for image, label, index in zip(*inputs(subject.data, batch), batch.indices.tolist(), strict=True):
            plain_image, plain_label = plain_images[index]
            assert (image - plain_image).abs().mean() < close
            assert label == plain_label


def test_processes_and_the_start(job):
    names = ["two_processes", "start_seconds"]
    results = dict(measure(load_recipe(job, [NO_TEACHER]), names, Effort(pairs=1, seconds=0)))
    assert list(results) == names
    assert results["two_processes"]["ratio"] > 0
    assert results["two_processes"]["gradient_communication_share"] < 1
    assert 0 < results["start_seconds"]["ratio"] < 300


def test_what_is_measured_is_chosen(job):
    recipe = load_recipe(job)
    assert set(choose(recipe, [])) == {"two_processes", "start_seconds", *DETAILS}
    assert choose(recipe, ["students_together", "loop"]) == ["loop", "students_together"]
    no_teacher = load_recipe(job, [NO_TEACHER])
    assert choose(no_teacher, []) == ["loop", "two_processes", "checkpoint", "start_seconds"]
    with pytest.raises(UserError, match="imitate needs a stage with objective blocks, which recipe chain has not"):
        choose(no_teacher, ["imitate"])


def test_sides_take_turns_and_are_timed_separately():
    order = []
    seconds = in_turns("test", {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, Effort(3, 0))
    assert order == list("ababababab")
    assert [len(taken) for taken in seconds.values()] == [3, 3]
    figure = Figure.of("a over b", "none", [2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
    assert (figure.ratio, figure.low, figure.high, figure.pairs) == (3, 2.5, 3.5, 3)


def test_the_command(job):
    command = [sys.executable, "-m", "tests.bench", job, "log_every_steps=1", "--only", "loop", "--json"]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(printed["machine"]) == {"cpu", "cores", "threads", "gpu", "torch", "load_average"}
    assert printed["loop"]["pairs"] == 5
