"""The recipes that come with the package."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gowide_dist import load_model, load_recipe
from gowide_dist.data.encode import encode
from gowide_dist.pipeline import walk
from gowide_dist.prepare import prepare
from gowide_dist.run import read_metrics
from gowide_dist.train.costs import network_cost, spent
from tests.command import gowide

JOBS = Path(__file__).parent.parent / "jobs"


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_explains_itself(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    head = path.read_text().split("name:")[0]
    assert all(f"# {word} " in head for word in ("Paper", "Command", "Cost", "Expect"))


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_comparisons_take_as_many_student_epochs_as_the_chain(path):
    recipe = load_recipe(path)
    last = "finetune" if "finetune" in recipe.stages else "distill"
    for network in recipe.stages["baseline"].train:
        epochs = {name: spent(f"{name}/{network}", recipe, 1000, 1).epochs for name in (last, "baseline", "kd")
                  if name in recipe.stages}  # fmt: skip
        assert len(set(epochs.values())) == 1, epochs


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_rehearsed(path, tmp_path):
    shown = gowide(
        "submit",
        path,
        "--cluster",
        JOBS.parent / "slurm/clusters/gpu8.yaml",
        "--dry-run",
        "--runs",
        "/shared/runs",
        cwd=tmp_path,
    )
    assert shown.returncode == 0, shown.stderr
    recipe = load_recipe(path)
    names = re.findall(rf"--job-name={recipe.name}:([^/\n]+)(?:/\S+)?$", shown.stdout, re.MULTILINE)
    assert [name for name in names if name != "teacher_logits"] == [*recipe.stages]  # a job for all networks of a stage
    assert list(tmp_path.iterdir()) == []


def test_the_readings_of_the_paper():
    a, b = load_recipe(JOBS / "imagenet_rn50.yaml"), load_recipe(JOBS / "imagenet_rn50_b.yaml")
    assert [stage.epochs for stage in a.stages.values()] == [90, 40, 50, 90, 90]
    assert [stage.epochs for stage in b.stages.values()] == [90, 10, 50, 30, 90, 90]
    for recipe in (a, b):
        assert network_cost(recipe.architectures["wide"], 1000, 224).parameters == 223_439_144
        assert recipe.batch_size == 256


def test_imagenets_networks_train_on_synthetic_jpegs(tmp_path, monkeypatch):
    """Two steps of the real WRN-50-4, then two of the half ResNet-50 imitating and distilling it, at a reduced batch."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (150 + 40 * index, 200, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    encode("imagefolder", tmp_path / "data", tmp_path / "images")
    recipe = load_recipe(
        JOBS / "imagenet_rn50.yaml",
        [f"data.train={tmp_path}/data/train.beton", f"data.val={tmp_path}/data/val.beton", "data.classes=2", "batch_size=2",
         "data.resolution=64", "precision=float32", "log_every_steps=1", "stages.teacher.epochs=1", "stages.imitate.epochs=1",
         "stages.distill.epochs=1", "stages.imitate.train=half", "stages.distill.train=half"],
    )  # fmt: skip
    prepared = prepare(recipe, tmp_path / "runs", only=["distill"])
    walk(prepared.run, [instance.key for instance in prepared.unfinished])
    for key in ("teacher/wide", "imitate/half", "distill/half"):
        done = prepared.run.stage(key).done
        assert (done.steps, done.images) == (2, 4)
        assert len(read_metrics(prepared.run.stage(key).metrics)) >= 3
    teacher = load_model(prepared.run.path, "teacher")
    assert (
        sum(parameter.numel() for parameter in teacher.parameters())
        == network_cost(teacher.architecture, 2, 64).parameters
        > 219e6
    )
    assert load_model(prepared.run.path, "distill").architecture.width == 0.5
