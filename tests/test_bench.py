"""gowide bench: whether this machine feeds and trains a recipe."""

import json

import pytest

from gowide_dist import load_recipe, steps
from gowide_dist.bench import loader, tables
from gowide_dist.data.encode import Options, encode
from gowide_dist.errors import DataError, UserError
from gowide_dist.recipe import Augment
from gowide_dist.steps import _warm_means, run_steps
from tests.command import gowide, refused
from tests.data.conftest import write_image_folder
from tests.fashion import chain, encode_part, write_job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    return write_job(root, chain(encode_part(root, 240, 60)))


def test_loader_against_the_usual_ways(tmp_path):
    write_image_folder(tmp_path / "images", 64, 4)
    encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(jpg_share=1.0, workers=1))
    augment = Augment.model_validate({"trivial_augment": True, "color_jitter": {"hue": 0.1}, "erase": 0.5})
    result = loader(tmp_path / "out", tmp_path / "images", batch_size=16, resolution=32, augment=augment)
    rates = result["images_per_s"]
    assert set(rates) == {"gowide_dist", "ffcv", "torchvision", "decode_only"} == set(result["memory_mib"])
    assert all(rate > 0 for rate in rates.values())
    ratios = {"over_ffcv", "over_torchvision", "of_decode_only", "memory_over_ffcv"}
    assert set(result) == {*ratios, "images_per_s", "memory_mib"}
    assert all(result[key] > 0 for key in ratios)
    assert result["of_decode_only"] < 2
    ((head, rows),) = tables({"loader": result})
    assert [row[2] for row in rows][1:3] == [str(result["over_ffcv"]), str(result["of_decode_only"])]
    assert all(len(row) == len(head) for row in rows)


def test_missing_folders_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.json: not found"):
        loader(tmp_path, batch_size=4)
    write_image_folder(tmp_path / "images", 4, 4)
    encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(workers=1))
    with pytest.raises(DataError, match="--images"):
        loader(tmp_path / "out", tmp_path / "nowhere", batch_size=4)


def test_the_loader_needs_none_of_the_recipe_s_files(tmp_path, job):
    missing = ["data.train=nowhere/train.beton", "data.val=nowhere/val.beton"]
    result = gowide("bench", job, *missing, "--data", job.parent / "data", "--only", "loader", "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert set(printed) == {"machine", "loader"}
    assert set(printed["machine"]) == {"cpu", "cores", "threads", "gpu", "torch", "load_average"}
    assert set(printed["loader"]) == {"over_ffcv", "memory_over_ffcv", "images_per_s", "memory_mib"}
    assert "--data and --images are for `loader`" in refused("bench", job, "--data", "data", "--only", "stages")


def test_stages_are_trained_as_they_will_be(job):
    students = ["networks.slim={widen: thin, by: 2}", "stages.distill.train=[thin, slim]", "stages.distill.init=null"]
    stored = [*students, "stages.distill.teacher_logits=stored", "stages.finetune.init=distill/thin"]
    result = gowide("bench", job, *stored, "--only", "stages", "--nproc", "2", "--json")
    assert result.returncode == 0, result.stderr
    stages = json.loads(result.stdout)["stages"]
    assert list(stages) == ["teacher", "imitate", "distill", "finetune"]
    for stage in stages.values():
        assert stage["steps"] == 4  # an epoch
        assert stage["images_per_s"] > 0
        assert 0 <= stage["data_wait"] < 1
        assert stage["memory_mib"] > 50


def test_the_limit_ends_a_stage_sooner(job, monkeypatch):
    monkeypatch.setattr(steps, "LIMIT_S", 0)
    times = run_steps(load_recipe(job), ["imitate/thin"], 1)
    assert times.num_steps == 1
    assert times.step_s > 0
    stored = load_recipe(job, ["stages.distill.teacher_logits=stored"])
    with pytest.raises(UserError, match=r"^distill/thin: no training step within 0 s; try a smaller batch_size$"):
        run_steps(stored, ["distill/thin"], 1)


def test_steps_count_when_they_are_warm(job):
    short = load_recipe(job, ["batch_size=10", "log_every_steps=2"])
    cold, fast, slow = ({"images_per_s": rate, "data_wait": wait} for rate, wait in ((1, 0.9), (10, 0.1), (5, 0.4)))
    of_two_blocks = [(1, cold), (2, cold), (4, fast), (5, cold), (6, cold), (8, slow)]
    step_s, data_wait = _warm_means([{"step": step, **line} for step, line in of_two_blocks], short)
    assert step_s == pytest.approx((1 + 2) / 2)
    assert data_wait == pytest.approx((1 * 0.1 + 2 * 0.4) / 3)
    assert _warm_means([{"step": 1, **fast}, {"step": 2, **cold}], short) == (10, 0.9)  # rather than nothing
