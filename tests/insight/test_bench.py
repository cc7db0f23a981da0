import json
from contextlib import closing
from pathlib import Path

import pytest

from gowide_dist import load_recipe
from gowide_dist.data.encode import Options, encode
from gowide_dist.errors import DataError, UserError
from gowide_dist.insight import bench
from gowide_dist.insight.bench.loader import loader
from gowide_dist.insight.bench.pairs import Effort, Figure, in_turns
from gowide_dist.insight.bench.plain import PlainImages
from gowide_dist.insight.bench.processes import growth
from gowide_dist.insight.bench.subject import open_subject
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


def test_loader_against_the_usual_ways(tmp_path: Path):
    write_image_folder(tmp_path / "images", 64, 4)
    encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(jpg_share=1.0, workers=1))
    result = loader(tmp_path / "out", tmp_path / "images", batch_size=16, resolution=32, num_threads=1)
    rates = result["images_per_s"]
    assert set(rates) == {"gowide_dist", "ffcv", "torchvision", "decode_only"} == set(result["memory_mib"])
    assert all(rate > 0 for rate in rates.values())
    assert all(result[key] > 0 for key in ("over_ffcv", "over_torchvision", "of_decode_only", "memory_over_ffcv"))
    assert result["of_decode_only"] < 2


def test_missing_folders_are_errors(tmp_path: Path):
    with pytest.raises(DataError, match=r"dataset\.json: not found"):
        loader(tmp_path)
    write_image_folder(tmp_path / "images", 4, 4)
    encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(workers=1))
    with pytest.raises(DataError, match="--images"):
        loader(tmp_path / "out", tmp_path / "nowhere")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    return write_job(root, chain(encode_part(root, 240, 60), log_every_steps=2))


@pytest.fixture(scope="module")
def figures(job):
    return dict(bench.measure(load_recipe(job), list(DETAILS), effort=LITTLE))


@pytest.mark.parametrize("name", DETAILS)
def test_figures_of_training(figures, name):
    result = figures[name]
    assert json.loads(json.dumps(result)) == result
    assert sorted(set(result) - {"what", "target", "ratio", "low", "high", "pairs"}) == DETAILS[name]
    assert result["low"] <= result["ratio"] <= result["high"]
    assert result["pairs"] == 2
    assert name == "checkpoint" or result["low"] > 0  # a save that costs nothing is noise around 0
    assert bench.as_text(name, result).startswith(f"{name}  ")


@pytest.mark.parametrize("jpg_share, close", [(0.0, 1e-5), (1.0, 0.03)])  # JPEG: FFCV's fast transform, Pillow's exact
def test_the_plain_way_reads_the_same_images(tmp_path: Path, jpg_share, close):
    write_image_folder(tmp_path / "images", 8, 8, most_px=40)
    encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(jpg_share=jpg_share, workers=1))
    plain = chain(tmp_path / "out", batch_size=8)
    plain["data"] |= {"resolution": 40, "augment": {}}
    recipe = load_recipe(write_job(tmp_path, plain))
    with open_subject(recipe, tmp_path, LITTLE) as subject, closing(subject.images.train(0)) as loader:
        batch = next(loader.batches())
        theirs = PlainImages(recipe, subject.images.mean, subject.images.std)
        for image, label, index in zip(*subject.images.to_device(batch), batch.indices.tolist(), strict=True):
            their_image, their_label = theirs[index]
            assert (image - their_image).abs().mean() < close
            assert label == their_label


def test_processes_and_the_start(job):
    no_teacher = load_recipe(job, ["stages={only: {train: thin, objective: labels, epochs: 1, optim: {lr: 0.1}}}"])
    names = ["two_processes", "simulation", "start_seconds"]
    found = dict(bench.measure(no_teacher, names, effort=Effort(pairs=1, seconds=0)))
    assert list(found) == names
    assert found["two_processes"]["ratio"] > 0
    assert found["two_processes"]["gradient_communication_share"] < 1
    assert found["simulation"]["ratio"] > 0
    assert 0 < found["start_seconds"]["ratio"] < 300


def test_growth(job):
    result = growth(load_recipe(job), LITTLE, times=(1, 2))
    assert [[row["times"] for row in rows] for rows in result.values()] == [[1, 2], [1, 2], [1, 2]]
    assert all(row["seconds"] > 0 and row["memory_mib"] > 50 for rows in result.values() for row in rows)
    assert result["processes"][1]["memory_ratio"] > 1.2  # every process holds the libraries
    assert "  images x2: " in bench.as_text("growth", result)


def test_what_is_measured_is_chosen(job):
    recipe = load_recipe(job)
    assert {"loader", "start_seconds", *DETAILS} < set(bench.choose(recipe, []))
    assert "growth" not in bench.choose(recipe, [])
    assert bench.choose(recipe, ["growth", "loop"]) == ["loop", "growth"]
    no_teacher = load_recipe(job, ["stages={only: {train: thin, objective: labels, epochs: 1, optim: {lr: 0.1}}}"])
    without = ["loader", "loop", "two_processes", "simulation", "checkpoint", "start_seconds"]
    assert bench.choose(no_teacher, []) == without
    with pytest.raises(UserError, match="imitate needs a stage with objective blocks, which recipe chain has not"):
        bench.choose(no_teacher, ["imitate"])
    with pytest.raises(UserError, match="nothing called 'lop' to measure, did you mean 'loop'"):
        bench.choose(recipe, ["lop"])
    with pytest.raises(UserError, match="--data and --images are for `loader`"):
        next(bench.measure(recipe, ["loop"], data=Path("elsewhere")))


def test_sides_take_turns_and_are_timed_apart():
    order = []
    seconds = in_turns("test", {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, Effort(3, 0))
    assert order == list("ababababab")
    assert [len(taken) for taken in seconds.values()] == [3, 3]
    figure = Figure.of("a over b", "none", [2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
    assert (figure.ratio, figure.low, figure.high, figure.pairs) == (3, 2.5, 3.5, 3)
