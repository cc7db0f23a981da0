"""What a recipe says in vain is told, and nothing else is."""

import json
from pathlib import Path

import pytest
import yaml

from gowide_dist import load_recipe
from gowide_dist.effects import without_effect
from gowide_dist.prepare import check_run
from tests.command import gowide
from tests.fashion import chain, encode_part, write_job
from tests.test_recipe import RECIPE

JOBS = Path(__file__).parent.parent / "jobs"
IMAGES = 80  # 10 steps an epoch; a stage has two epochs, and one of its four blocks half an epoch


def told(tmp_path, *overrides):
    """What is told of a recipe in whose default form all has its effect, each line once."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    recipe = load_recipe(path, overrides)
    return without_effect(recipe, recipe.instances.values(), IMAGES)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["teacher.schedule.warmup_epochs=2"], "teacher.schedule.warmup_epochs: 2, but the stage has 2 epochs"),
        (["teacher.schedule.warmup_epochs=5"], "teacher.schedule.warmup_epochs: 5, but the stage has 2 epochs"),
        (["imitate.schedule.warmup_epochs=0.5"], "imitate.schedule.warmup_epochs: 0.5, but a block has 0.5 epochs"),
        (["teacher.schedule={milestones: [1, 2]}"], "teacher.schedule.milestones: 2 never come, for the stage has 2"),
        (["imitate.schedule={milestones: [0.6, 1]}"], "imitate.schedule.milestones: 0.6, 1 never come, for a block"),
        (
            ["teacher.schedule={milestones: [0.4], warmup_epochs: 0.5}"],
            "teacher.schedule.milestones: 0.4 fall into the warm-up of 0.5 epochs",
        ),
        (["teacher.schedule={decay: linear, factor: 0.5}"], "teacher.schedule.factor: belongs to milestones"),
        (["teacher.schedule={milestones: [1], factor: 1}"], "teacher.schedule.factor: 1 leaves the learning rate"),
        (["teacher.schedule={milestones: [1], factor: 0}"], "teacher.schedule.factor: 0 ends all learning there"),
        (["teacher.optim.ema=0.99"], "teacher.optim.ema: 0.99 averages over 100 steps, but the stage has 2 epochs of 20"),
        (["imitate.optim.ema=0.9"], "imitate.optim.ema: 0.9 averages over 10 steps, but a block has 0.5 epochs of 5"),
        (["teacher.optim.decay_norms=false"], "teacher.optim.decay_norms: has no effect without weight_decay"),
        (["teacher.label_smoothing=1"], "teacher.label_smoothing: 1 leaves nothing of the labels"),
        (["distill.labels_weight=1"], "distill.labels_weight: 1 leaves no weight to the teacher's logits: loss: kl"),
        (["finetune.epochs=0", "finetune.init={file: a.pth, classifier: fresh}", "finetune.optim=null"], "finetune.init.classifier: fresh stays as it is drawn"),
        (["distill.teacher=imitate/half"], "distill.teacher: its weights are those that the stage starts from"),
        (["teacher.train=half", "imitate.train=half", "distill.train=half", "finetune.train=half", "distill.teacher=teacher", "imitate.start=teacher"], "imitate.teacher: its weights are those"),
        (["finetune.epochs=0", "finetune.mixup=1"], "finetune.epochs: 0 trains nothing, so that optim, mixup has no"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_told_once(tmp_path, overrides, line):
    (only,) = told(tmp_path, *(f"stages.{override}" for override in overrides))
    assert only.startswith(f"stages.{line}")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("data.val=x/../train.beton", "data.val: is the file of the training images"),
        ("data.augment={crop: {}, translate: 4}", "data.augment.translate: has no effect beside crop"),
        ("stages.teacher.ramp={start_px: 28, until_epoch: 1}", "stages.teacher.ramp.start_px: 28 is the resolution"),
        (
            "stages.teacher.ramp={start_px: 32, until_epoch: 5}",
            "stages.teacher.ramp.until_epoch: 5, but the stage's epochs are 2: its images reach 64 of 224 px",
        ),
        (
            "stages.teacher.ramp={start_px: 32, end_px: 160, from_epoch: 2, until_epoch: 3}",
            "stages.teacher.ramp.until_epoch: 3, but the stage's epochs are 2: its images reach 32 of 160 px",
        ),
    ],
)
def test_a_crop_and_a_ramp_without_effect(tmp_path, data, line):
    side = ["data.resolution=224"] if "start_px: 32" in data else []
    (only,) = told(tmp_path, *side, "data.augment.crop={}", data)
    assert only.startswith(line)


def test_more_blocks_than_steps(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    recipe = load_recipe(path, ["stages.imitate.epochs=1"])
    (line,) = without_effect(recipe, recipe.select(["imitate"]).values(), 3 * 8)
    assert line == "stages.imitate.epochs: its 3 steps are fewer than its 4 blocks, some of which never train"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["stages.teacher.schedule.warmup_epochs=1.9", "stages.imitate.schedule.warmup_epochs=0.4"],
        ["stages.teacher.schedule={milestones: [1, 1.9], warmup_epochs: 1}"],
        ["stages.teacher.optim={lr: 0.1, ema: 0.95, weight_decay: 0.1, decay_norms: false}"],
        ["stages.imitate.order=joint", "stages.imitate.schedule.warmup_epochs=0.5", "stages.imitate.optim.ema=0.95"],
        ["data.resolution=224", "data.augment.crop={}", "stages.teacher.ramp={start_px: 128, until_epoch: 1}"],
        ["data.resolution=224", "data.augment.crop={}", "stages.teacher.ramp={start_px: 9, end_px: 9, until_epoch: 9}"],
        ["stages.distill.labels_weight=0.9", "stages.distill.temperature=4"],
    ],
)
def test_nothing_is_told_of_what_works(tmp_path, overrides):
    assert told(tmp_path, *overrides) == []


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_recipes_say_nothing_in_vain(path):
    recipe = load_recipe(path)
    num_images = 1_281_167 if "imagenet" in path.name else 50_000
    assert without_effect(recipe, recipe.instances.values(), num_images) == []


def test_plan_and_run_tell_it_of_what_is_left(tmp_path, capsys):
    job = write_job(tmp_path, chain(encode_part(tmp_path, 120, 60)))
    vain = "stages.imitate.schedule.warmup_epochs=2"
    line = "stages.imitate.schedule.warmup_epochs: 2, but a block has 1 epoch: the learning rate never reaches lr"
    planned = json.loads(gowide("plan", job, vain, "--json").stdout)
    assert [warning for warning in planned["warnings"] if line in warning]
    recipe = load_recipe(job, [vain])
    check_run(recipe, tmp_path / "runs")
    assert f"warning: {line}" in capsys.readouterr().err
    check_run(recipe, tmp_path / "runs", only=["teacher"])
    assert capsys.readouterr().err == ""
