import copy
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gowide_dist import load_recipe
from gowide_dist.errors import RecipeError
from gowide_dist.identity import recipe_identity
from gowide_dist.networks.normalise import DATASET
from gowide_dist.recipe import Recipe
from gowide_dist.stages import Ramp

RECIPE = {
    "name": "small",
    "data": {"train": "train.beton", "val": "val.beton", "resolution": 28},
    "batch_size": 8,
    "networks": {
        "half": {"arch": "resnet50", "stem": "small", "width": 0.5},
        "quarter": {"arch": "resnet50", "stem": "small", "width": 0.25},
        "shallow": {"arch": "resnet18", "stem": "small"},
        "wide": {"widen": "half", "by": 8},
    },
    "stages": {
        "finetune": {"train": ["half", "quarter"], "init": "distill", "objective": "labels", "epochs": 2, "optim": {"lr": 0.1}},
        "teacher": {"train": "wide", "objective": "labels", "epochs": 2, "optim": {"lr": 0.1}},
        "imitate": {"train": ["half", "quarter"], "objective": "blocks", "teacher": "teacher", "epochs": 2, "optim": {"lr": 0.1}},
        "distill": {
            "train": ["half", "quarter"],
            "init": "imitate",
            "objective": "kl",
            "teacher": "teacher/wide",
            "epochs": 2,
            "optim": {"lr": "1e-1"},
        },
    },
}  # fmt: skip


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def test_expands_into_the_graph_of_instances(job):
    recipe = load_recipe(job)
    assert {key: instance.parents for key, instance in recipe.instances.items()} == {
        "teacher/wide": (),
        "imitate/half": ("teacher/wide",),
        "imitate/quarter": ("teacher/wide",),
        "distill/half": ("imitate/half", "teacher/wide"),
        "distill/quarter": ("imitate/quarter", "teacher/wide"),
        "finetune/half": ("distill/half",),
        "finetune/quarter": ("distill/quarter",),
    }
    seen = set()
    for key, instance in recipe.instances.items():  # parents come first
        assert seen.issuperset(instance.parents)
        seen.add(key)
    assert recipe.architectures["wide"].width == 4.0
    assert recipe.stages["distill"].optim.lr == 0.1  # YAML reads 1e-1 as text


def test_a_selection_includes_ancestors(job):
    recipe = load_recipe(job)
    assert list(recipe.select(["distill/half"])) == ["teacher/wide", "imitate/half", "distill/half"]
    assert list(recipe.select(["imitate"])) == ["teacher/wide", "imitate/half", "imitate/quarter"]
    with pytest.raises(RecipeError, match=r"no stage 'distil' in recipe small, did you mean 'distill'\?"):
        recipe.select(["distil"])


def test_a_recipe_survives_its_yaml(job, tmp_path):
    recipe = load_recipe(job)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(resolved) == recipe
    assert load_recipe(resolved).to_yaml() == recipe.to_yaml()
    assert yaml.safe_load(recipe.to_yaml())["stages"]["teacher"]["optim"]["momentum"] == 0.9


def test_overrides_by_dotted_key(job):
    recipe = load_recipe(
        job,
        ["stages.teacher.epochs=7", "seed=3", "data.augment.flip=true", "stages.teacher.schedule={milestones: [1, 2]}",
         "networks.quarter.width=0.125", "name=other"],
    )  # fmt: skip
    assert (recipe.stages["teacher"].epochs, recipe.seed, recipe.data.augment.flip) == (7, 3, True)
    assert recipe.stages["teacher"].schedule.decay == "step"
    assert recipe.architectures["quarter"].width == 0.125
    assert recipe.name == "other"


def test_paths_take_home_and_variables(job, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("INDIRECT", "~/deep")
    recipe = load_recipe(
        job,
        ["data.train=~/a/train.beton", "data.val=$SCRATCH/a$5/${SCRATCH}.beton", "stages.teacher.init={file: $INDIRECT/x.pth}"],
    )  # fmt: skip
    assert str(recipe.data.train) == "/home/me/a/train.beton"
    assert str(recipe.data.val) == "/scratch/a$5/scratch.beton"
    assert str(recipe.instances["teacher/wide"].init_file.file) == "/home/me/deep/x.pth"
    assert "~" not in recipe.to_yaml() and "$S" not in recipe.to_yaml()  # processes elsewhere see the same files
    monkeypatch.setenv("EMPTY", "")
    for path, fault in {
        "$UNSET/a": "$UNSET/a: the variable UNSET is not set; set it, or write the path out",
        "x/${EMPTY}/a": "x/${EMPTY}/a: the variable EMPTY is not set",
        "~nobody-of-this-name/a": "~nobody-of-this-name/a: there is no such user, or no home folder",
    }.items():
        with pytest.raises(RecipeError, match=re.escape(f"{job}: data.val: {fault}")):
            load_recipe(job, [f"data.val={path}"])


def test_an_override_changes_one_key_alone(tmp_path, job):
    """Also where a YAML alias gives several stages the same mapping."""
    values = yaml.safe_load(job.read_text())
    shared = {"lr": 0.1}
    for stage in values["stages"].values():
        stage["optim"] = shared
    path = tmp_path / "aliases.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert "*id001" in path.read_text()
    rates = {name: stage.optim.lr for name, stage in load_recipe(path, ["stages.teacher.optim.lr=0.5"]).stages.items()}
    assert rates.pop("teacher") == 0.5
    assert set(rates.values()) == {0.1}


BAD = {
    "stages.distill.epoch=3": "stages.distill: unknown key 'epoch', did you mean 'epochs'?",
    "stages.distil.epochs=3": "override 'stages.distil.epochs=3': no 'distil' in stages, did you mean 'distill'?",
    "stages.distill.temprature=3": "stages.distill: unknown key 'temprature', did you mean 'temperature'?",
    "stages.teacher.temperature=3": "stages.teacher: unknown key 'temperature', valid: train, init, epochs",
    "networks.half.widht=3": "networks.half: unknown key 'widht', did you mean 'width'?",
    "networks.half.arch=resnt50": "networks.half: no arch 'resnt50', did you mean 'resnet50'?",
    "networks.half.depths=[1]": "networks.half: arch already says depths",
    "networks.wide.widen=hlf": "networks.wide.widen: no network 'hlf', did you mean 'half'?",
    "networks.wide.widen=wide": "networks.wide.widen: dependency cycle wide -> wide",
    "networks.wide.by=-1": "networks.wide.by: should be greater than 0, not '-1'",
    "networks.half.normalise=imagnet": "networks.half.normalise: should be dataset, imagenet or {mean: [...], std: [...]}, not 'imagnet'",
    "networks.half.normalise=true": "networks.half.normalise: should be dataset, imagenet or {mean: [...], std: [...]}, not 'True'",
    "networks.half.normalise={mean: [0.5, 0.5, 0.5]}": "networks.half.normalise: mean and std need each other",
    "networks.half.normalise={mean: [123.7, 116.3, 103.5], std: 1}": "networks.half.normalise: mean: should be of pixels / 255, from 0 to 1, not 123.7",
    "networks.half.normalise={mean: 0.5, std: 0}": "networks.half.normalise: std: should be of pixels / 255, from 0.0001 to 1, not 0",
    "networks.half.normalise={mean: [0.5, 0.5], std: 0.5}": "networks.half.normalise.mean.2: is required",
    "networks.half.normalise={men: 0.5, std: 0.5}": "networks.half.normalise: unknown key 'men', did you mean 'mean'?",
    "networks.wide.normalise=zscore": "networks.wide.normalise: should be dataset, imagenet or {mean: [...], std: [...]}, not 'zscore'",
    "stages.teacher.init={file: w.pth, classifer: fresh}": "stages.teacher.init: unknown key 'classifer', did you mean 'classifier'?",
    "stages.teacher.init={file: w.pth, classifier: new}": "stages.teacher.init.classifier: should be 'file' or 'fresh', not 'new'",
    "networks.a b={arch: resnet18}": "networks.a b: should be a name of letters, digits, '-' and '_'",
    "stages.distill.epochs=abc": "stages.distill.epochs: should be a valid integer, not 'abc'",
    "stages.distill.epochs=true": "stages.distill.epochs: should be a valid integer, not 'True'",
    "stages.distill.epochs=-1": "stages.distill.epochs: should be greater than or equal to 0, not '-1'",
    "stages.distill.optim.lr=true": "stages.distill.optim.lr: should be a number, not true",
    "stages.distill.optim.lr=.nan": "stages.distill.optim.lr: should be a finite number, not 'nan'",
    "stages.distill.optim=": "stages.distill: optim is required to train",
    "stages.distill.objective=k": "stages.distill: 'objective' should be one of 'labels', 'blocks', 'kl', not 'k'",
    "stages.distill.quantised=int8": "stages.distill.quantised: should be false, true or 'symmetric', not 'int8'",
    "stages.distill.schedule=cosin": "stages.distill.schedule: should be 'cosine', 'linear', 'step' or 'constant', not 'cosin'",
    "stages.distill.schedule.milestones=[3, 2]": "stages.distill.schedule: milestones should increase",
    "stages.distill.schedule.decay=step": "stages.distill.schedule: decay: step and milestones need each other",
    "stages.distill.teacher=nobody": "stages.distill.teacher: no stage 'nobody', valid: finetune, teacher, imitate, distill",
    "stages.distill.teacher=imitate": "stages.distill.teacher: stage 'imitate' trains several networks, name one: imitate/half",
    "stages.distill.teacher=teacher/half": "stages.distill.teacher: stage 'teacher' does not train network 'half' but wide",
    "stages.teacher.init=finetune": "stages.teacher.init: stage 'finetune' does not train network 'wide' but half, quarter",
    "stages.teacher.init=finetune/half": "stages.teacher.init: finetune/half has another architecture than network 'wide'",
    "stages.imitate.init=finetune": "stages: dependency cycle among finetune/half, finetune/quarter, imitate/half",
    "stages.imitate.train=[half, half]": "stages.imitate.train: names a network twice",
    "stages.imitate.train=[hal]": "stages.imitate.train: no network 'hal', did you mean 'half'?",
    "networks.half.stem=imagenet": "stages.imitate.teacher: the blocks of teacher/wide (4 blocks, imagenet stem) do not match those of network 'quarter'",
    "batch_size=1.5": "batch_size: should be a valid integer, not '1.5'",
    "seed=-1": "seed: should be greater than or equal to 0, not '-1'",
    "data=5": "data: should be a mapping of keys to values, not '5'",
    "data.train=5": "data.train: should be a path, not '5'",
    "data.train.x=5": "override 'data.train.x=5': data.train is a value, not a mapping of keys",
    "seed={a:": "a shell wants quotes around an override with blanks",
    "seed": "override 'seed': should look like stages.distill.epochs=5",
    "..=1": "override '..=1': should look like stages.distill.epochs=5",
    "stages.teacher.ramp={start_px: 16, until_epoch: 1}": "stages.teacher.ramp: needs data.augment.crop",
    "stages.teacher.ramp={start_px: 16, end_px: 8, until_epoch: 1}": "ramp: end_px (8) should not be less than start",
    "stages.teacher.ramp={start_px: 8, from_epoch: 2, until_epoch: 2}": "from_epoch (2) should be less than until_ep",
    "stages.teacher.epochs=0": "stages.teacher: epochs: 0 needs init, whose weights it uses unchanged",
    "stages.teacher.optim=null": "stages.teacher: optim is required to train",
    "stages.imitate={train: half, objective: blocks, teacher: teacher, epochs: 1, optim: {lr: 1}, inputs: teacher, prefix: trained}": "prefix: trained needs inputs: student",
    "stages.imitate={train: half, objective: blocks, teacher: teacher, epochs: 1, optim: {lr: 1}, start: teacher, init: teacher}": "stages.imitate: start: teacher and init both say",
    "stages.distill.loss=dst": "stages.distill.loss: should be 'kl', 'dist' or 'dkd', not 'dst'",
    "stages.distill.others_weight=2": "stages.distill: target_weight and others_weight: belong to loss: dkd, which is kl here",
    "stages.distill.blocks_weight=-1": "stages.distill.blocks_weight: should be greater than or equal to 0, not '-1'",
    "stages.imitate.block_weights=[1, 0, 1, 1]": "stages.imitate.block_weights.1: should be greater than 0, not '0'",
    "stages.imitate.block_weights=[1, 2]": "stages.imitate.block_weights: has 2 weights, but network 'half' has 4 blocks",
    "stages.distill.start=pruned": "stages.distill: start: pruned and init both say",
    "stages.distill.class_weights=balanced": "stages.distill: class_weights: weights the cross-entropy on the labels; set",
    "stages.teacher.class_weights=[1, 2]": "stages.teacher.class_weights: should be 'balanced', not a list",
    "stages.teacher.class_weights=balance": "stages.teacher.class_weights: should be 'balanced', not 'balance'",
    "stages.imitate.class_weights=balanced": "stages.imitate: unknown key 'class_weights', did you mean 'block_weights'?",
    "stages.teacher.init={fil: x}": "stages.teacher.init: unknown key 'fil', did you mean 'file'?",
    "stages.teacher.init=5": "stages.teacher.init: should be a valid string, not '5'; put it in quotes",
    "data.train=s3://bucket/train.beton": "data.train: s3:/bucket/train.beton: a URL; nothing is ever downloaded, give",
    "name=2024-01-01": "name: should be a valid string, not '2024-01-01'; put it in quotes",
    "batch_size=010": "batch_size: should be a valid integer, not '010'",  # YAML 1.1 reads it to the base of 8
    "stages.distill.optim={lr: 0.1, momentum: 0, nesterov: true}": "stages.distill.optim: nesterov needs a momentum",
    "stages.distill.optim.ema=1": "stages.distill.optim.ema: should be less than 1, not '1'",
    "data.augment.crop={scale: [1, 0.1]}": "data.augment.crop: scale: should be [least, greatest] part of the area",
    "data.augment.crop={ratio: [2, 1]}": "data.augment.crop: ratio: should be [least, greatest] width over height",
    "data.augment.erase=0": "data.augment.erase: should be greater than 0, not '0'",
    "data.augment.erase={probability: 0.1, scale: [1, 1]}": "data.augment.erase: erases nothing: no box of this scale",
    "data.augment.erase={probability: 0.1, ratio: [60, 70]}": "data.augment.erase: erases nothing: no box of this scale",
    "data.augment.erase={probability: 0.1, ratio: [2, 1]}": "data.augment.erase: ratio: should be [least, greatest] height",
    "data.augment.color_jitter={}": "data.augment.color_jitter: should set brightness, contrast, saturation or hue",
    "data.augment.color_jitter.hue=0.6": "data.augment.color_jitter.hue: should be less than or equal to 0.5, not '0.6'",
    "data.augment.rand_augment.magnitude=31": "data.augment.rand_augment.magnitude: should be less than or equal to 30",
    "data.augment.rand_augment.num_ops=0": "data.augment.rand_augment.num_ops: should be greater than or equal to 1",
    "data.augment={trivial_augment: true, rand_augment: {}}": "data.augment: trivial_augment and rand_augment are policies",
    "data.augment.translate=32": "data: augment.translate: should be less than resolution (28 px), not 32 px",
    "data.augment.erase.ratio=[3, 0]": "data.augment.erase.probability: is required (and at fault: data.augment.erase.ratio.1)",
    "data.augment.erase={probability: 0.1, ratio: 3}": "data.augment.erase.ratio: should be a list, not '3'",
    "data.augment.erase={probability:0.1}": "data.augment.erase: unknown key 'probability:0.1', write a space after the",
    'data.augment={"a\\nb": 1}': "data.augment: unknown key 'a b', valid: flip, ",
    "stages.imitate.block_weights=[0, 1, 0, 0]": "not '0' (and at fault: stages.imitate.block_weights.2, stages.imitate.block_weights.3)",
    "stages.imitate.block_weights=[0, 0, 0, 0, 0, 0]": "stages.imitate.block_weights.3, 2 more)",
    "stages.distill.temperature=1e9": "stages.distill.temperature: should be less than or equal to 1000, not '1",
    "stages.distill.temperature=1e-300": "stages.distill.temperature: should be greater than or equal to 0.001, not",
    "stages.teacher.mixup=1e308": "stages.teacher.mixup: should be 0, which turns it off, or from 0.001 to 1000, not",
    "stages.distill.cutmix=5e-324": "stages.distill.cutmix: should be 0, which turns it off, or from 0.001 to 1000, not",
    "name=../up": "name: should be a name of letters",
}  # fmt: skip


@pytest.mark.parametrize("override", BAD)
def test_a_bad_value_is_named_with_its_key_and_what_to_write(job, override):
    with pytest.raises(RecipeError) as caught:
        load_recipe(job, [override])
    message = str(caught.value)
    assert BAD[override] in message
    assert "\n" not in message
    assert override in message or message.startswith(f"{job}: ")


def test_a_classifier_that_was_never_trained_cannot_teach(job):
    """Where its blocks alone teach, it does not matter."""
    untrained = "stages.teacher={train: wide, objective: labels, epochs: 0, init: {file: w.pth, classifier: fresh}}"
    fault = r"the classifier of teacher/wide is drawn at random \(classifier: fresh\) and never trained \(epochs: 0\)"
    with pytest.raises(
        RecipeError, match=f"stages.imitate.teacher: {fault}; train it for some epochs, or take classifier"
    ):
        load_recipe(job, [untrained])
    with pytest.raises(RecipeError, match=f"stages.distill.teacher: {fault}; train it for some epochs$"):
        load_recipe(job, [untrained, "stages.imitate.classifier=fresh"])
    plain = "stages.distill={train: [half, quarter], init: imitate, objective: labels, epochs: 1, optim: {lr: 0.1}}"
    load_recipe(job, [untrained, "stages.imitate.classifier=fresh", plain])


def test_normalisation_of_networks(job, tmp_path):
    """The same values are the same network, however they are written; a widened network has that of the thin one."""
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": ["0.229", 0.224, 0.225]}
    for text in ("imagenet", f"{imagenet}"):
        recipe = load_recipe(job, [f"networks.half.normalise={text}"])
        assert recipe.architectures["half"].normalise.std == (0.229, 0.224, 0.225)
        assert recipe.architectures["wide"].normalise == recipe.architectures["half"].normalise
        identity = recipe_identity(recipe.instances["imitate/half"], recipe)
        assert identity["network"] == {**BASE["network"], "normalise": "imagenet"}
        (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
        assert load_recipe(tmp_path / "resolved.yaml") == recipe
    one = load_recipe(job, ["networks.half.normalise={mean: 0.5, std: 5e-1}", "networks.wide.normalise=dataset"])
    assert one.architectures["half"].normalise.mean == (0.5, 0.5, 0.5)
    assert one.architectures["wide"].normalise == DATASET
    plain = load_recipe(job, ["networks.half.normalise=dataset"])
    assert recipe_identity(plain.instances["imitate/half"], plain) == BASE


BASE = {
    "seed": 0, "batch_size": 8, "precision": "float32", "compile": False, "sync_batch_norm": False, "data": {"resolution": 28},
    "network": {"block": "bottleneck", "depths": [3, 4, 6, 3], "width": 0.5, "stem": "small"},
    "stage": {"objective": "blocks", "epochs": 2, "optim": {"lr": 0.1}},
}  # fmt: skip


def test_weights_start_where_images_are_normalised_alike(job):
    """Weights that are taken over expect the normalisation that they were trained with."""
    other = "networks.wide.normalise=imagenet"
    load_recipe(job, [other])  # a teacher may differ
    for start in ("teacher", "pruned"):
        with pytest.raises(
            RecipeError, match=r"imitate.start: the weights of teacher/wide expect another normalisation than "
        ):
            load_recipe(job, [other, f"stages.imitate.start={start}"])
    imitate = (
        "stages.imitate={train: [quarter, quarter2], objective: blocks, teacher: teacher, epochs: 2, optim: {lr: 0.1}}"
    )
    twin = "networks.quarter2={arch: resnet50, stem: small, width: 0.25, normalise: imagenet}"
    distill = "stages.distill={train: quarter, init: imitate/quarter2, objective: labels, epochs: 1, optim: {lr: 0.1}}"
    with pytest.raises(
        RecipeError, match=r"distill.init: imitate/quarter2 has another normalisation than network 'quarter'"
    ):
        load_recipe(job, [twin, imitate, distill, "stages.finetune.train=[quarter]"])


def test_a_student_with_another_stem_cannot_start_from_its_teacher(job):
    with pytest.raises(RecipeError, match=r"imitate\.start: the stem of teacher/wide .* does not fit network 'half'"):
        load_recipe(job, ["stages.imitate.start=teacher", "networks.half.channels=0.5", "networks.wide.widen=quarter"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["teacher_logits=stored", "top_k=3", "loss=dist"],
            "top_k: loss: dist needs every class by itself; leave top_k",
        ),
        (["teacher_logits=stored", "top_k=3", "loss=dkd"], "top_k: loss: dkd needs every class by itself; leave top_k"),
        (["teacher_logits=stored", "top_k=3", "standardise=true"], "top_k: standardise needs every class by itself"),
        (["teacher_logits=stored", "blocks_weight=1"], "blocks_weight: needs teacher_logits: live; outputs of blocks"),
        (["quantised=true", "blocks_weight=1"], "blocks_weight: compares blocks, and a network of 8 bits gives logits"),
        (["quantised=true", "epochs=0"], "quantised: fine-tunes a network; give epochs, and init, the weights that"),
        (["quantised=true", "ramp={start_px: 16, until_epoch: 1}"], "quantised: needs images of one size; leave ramp"),
        (["loss=dkd", "cutmix=1"], "loss: dkd needs one label for each image; leave mixup and cutmix out"),
        (["loss=dkd", "target_weight=0", "others_weight=0"], "one of them should be greater than 0"),
    ],
)
def test_terms_of_a_distillation_that_exclude_each_other(job, overrides, message):
    with pytest.raises(RecipeError, match=f"stages.distill: .*{message}"):
        load_recipe(job, [f"stages.distill.{override}" for override in overrides])


def test_a_rounded_network_teaches_nobody(job):
    with pytest.raises(
        RecipeError, match=r"again\.teacher: distill/half is trained to be rounded .*; learn from imitate"
    ):
        load_recipe(
            job,
            [
                "stages.distill.quantised=true",
                "stages.again={train: quarter, objective: kl, teacher: distill/half, epochs: 1, optim: {lr: 1}}",
            ],
        )


def test_a_head_that_computes_channels_is_the_teachers_or_ones_own(job):
    """MobileNets have a convolution behind the blocks, whose channels grow above `channels: 1`."""
    mobile = ["networks.half={arch: mobilenet_v2}", "networks.quarter={arch: mobilenet_v2, channels: 0.35}"]
    load_recipe(job, mobile)
    wide = [*mobile, "networks.wide={arch: mobilenet_v2, channels: 1.4, width: 2}"]
    with pytest.raises(
        RecipeError, match=r"imitate\.classifier: the 1x1 convolution behind the blocks of teacher/wide \(1792 channels\) "
        r"does not fit network 'half' \(1280 channels\); take classifier: fresh",
    ):  # fmt: skip
        load_recipe(job, wide)
    load_recipe(job, [*wide, "stages.imitate.classifier=fresh"])


def test_blocks_beside_the_logits_need_equal_channels(job):
    weight = "stages.distill.blocks_weight=1"
    load_recipe(job, [weight])
    with pytest.raises(
        RecipeError, match=r"distill\.blocks_weight: the blocks of teacher/wide \(small stem, .* differ"
    ):
        load_recipe(job, [weight, "networks.quarter.channels=0.5"])


def test_a_correlation_over_a_batch_needs_more_than_one_image(job):
    recipe = load_recipe(job, ["stages.distill.loss=dist", "stages.distill.optim.accumulate=4"])
    recipe.check_processes(1)
    with pytest.raises(
        RecipeError, match=r"stages\.distill\.loss: dist correlates over a batch, .* one image at a time"
    ):
        recipe.check_processes(2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["networks.quarter.channels=0.5"], "the stem of teacher/wide .* does not fit network 'quarter'"),
        (
            ["networks.quarter.arch=resnet18"],
            "has bottleneck units and network 'quarter' basic units, .* start: teacher",
        ),
        (
            [
                "networks.quarter={arch: mobilenet_v2}",
                "stages.imitate.classifier=fresh",
                "networks.half={block: bottleneck, depths: [1, 1, 1, 1, 1], stem: strided}",
            ],
            "has bottleneck units and network 'quarter' inverted units, .* take start: fresh",
        ),
        (
            ["networks.quarter.channels=0.5", "networks.quarter.stem_channels=64"],
            r"the blocks of teacher/wide pass on \[256, .* and those of network 'quarter' \[128, .* no pruning changes",
        ),
        (
            ["networks.quarter.width=8"],
            r"network 'quarter' has more inner channels \[512, .*\] than teacher/wide \[256, ",
        ),
    ],
)
def test_what_cannot_be_pruned_is_told(job, overrides, message):
    with pytest.raises(RecipeError, match=rf"imitate\.start: .*{message}"):
        load_recipe(job, ["stages.imitate.start=pruned", *overrides])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "should hold a mapping of keys to values, not nothing"),
        ("- a", "should hold a mapping of keys to values, not a list"),
        ("a: [", "not valid YAML in line 1"),
        ("name: a\nseed: 1\nseed: 2", "not valid YAML in line 3: key 'seed' is written twice"),
        ("name: a", "data: is required (and at fault: batch_size, networks, stages)"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("x: 2024-99-99", "not valid YAML"),
        ("&a [*a]", "should hold a mapping"),
    ],
)
def test_bad_files_name_the_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_a_student_thin_in_all_channels_has_a_teacher_too(job):
    recipe = load_recipe(job, ["stages.imitate.train=[half, quarter, shallow]"])
    assert recipe.instances["imitate/shallow"].parents == ("teacher/wide",)


def test_images_that_grow():
    ramp = Ramp(start_px=160, until_epoch=8)
    assert [ramp.side(epoch, 224) for epoch in (0, 1, 2, 4, 6, 7, 8, 50)] == [160, 160, 160, 192, 224, 224, 224, 224]
    assert Ramp(start_px=20, until_epoch=2).side(0, 28) == 20
    late = Ramp(start_px=160, end_px=192, from_epoch=11, until_epoch=13)
    assert [late.side(epoch, 224) for epoch in (0, 11, 12, 13, 15)] == [160, 160, 160, 192, 192]
    assert {Ramp(start_px=176, end_px=176, until_epoch=1).side(epoch, 224) for epoch in range(3)} == {176}


def test_micro_batches_are_equal(job):
    recipe = load_recipe(job, ["stages.teacher.optim.accumulate=4"])
    recipe.check_processes(2)
    with pytest.raises(
        RecipeError, match=r"stages.teacher.optim.accumulate: the local batch of 2 images is not divisible by 4"
    ):
        recipe.check_processes(4)


@pytest.mark.parametrize(
    ("overrides", "side"),
    [
        (["data.resolution=8"], 8),  # under a small stem and 4 blocks
        (["data.augment.crop={}", "stages.teacher.ramp={start_px: 1, until_epoch: 1}"], 1),
        (["networks.half.stem=imagenet", "data.resolution=32", "networks.quarter.stem=imagenet"], 32),
    ],
)
def test_no_batch_norm_gets_a_single_value(job, overrides, side):
    recipe = load_recipe(job, ["stages.teacher.optim.accumulate=8", *overrides])
    fault = f"stages.teacher: network 'wide' makes one pixel of {side} px, which no batch norm can normalise, as a "
    with pytest.raises(RecipeError, match=f"{fault}process takes one image at a time; take fewer"):
        recipe.check_processes(1)
    load_recipe(job, [*overrides, "stages.teacher.optim.accumulate=4"]).check_processes(1)
    larger = recipe.model_copy(update={"data": recipe.data.model_copy(update={"resolution": 33})})
    if not recipe.stages["teacher"].ramp:
        larger.check_processes(1)


def test_local_batches_are_equal(job):
    recipe = load_recipe(job)
    recipe.check_processes(4)
    with pytest.raises(RecipeError, match="batch_size: 8 is not divisible by 3 processes"):
        recipe.check_processes(3)


def test_mixed_images_need_pairs(job):
    recipe = load_recipe(job, ["stages.distill.cutmix=1", "batch_size=12"])
    recipe.check_processes(2)
    with pytest.raises(
        RecipeError, match=r"stages.distill: cutmix mixes pairs of images, but the local batch of 3 is odd"
    ):
        recipe.check_processes(4)


garbage = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)
keys_of_recipes = [
        ("name",), ("seed",), ("data",), ("data", "train"), ("data", "augment"), ("batch_size",), ("networks",),
        ("networks", "half"), ("networks", "half", "arch"), ("networks", "half", "depths"), ("networks", "wide", "by"),
        ("networks", "wide", "widen"), ("stages",), ("stages", "distill"), ("stages", "distill", "objective"),
        ("stages", "distill", "train"), ("stages", "distill", "schedule"), ("stages", "distill", "optim"),
        ("stages", "distill", "teacher"), ("stages", "distill", "init"), ("checkpoints",), ("unheard",),
]  # fmt: skip


@garbage
@given(st.sampled_from(keys_of_recipes), values)
def test_garbage_is_a_recipe_or_an_error_of_one_line(tmp_path, keys, value):
    recipe = copy.deepcopy(RECIPE)
    target = recipe
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False))
    _load_or_one_line(path)


@garbage
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_garbage_files(tmp_path, content):
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    _load_or_one_line(path)


@garbage
@given(
    st.text(max_size=40) | st.builds("{}={}".format, st.sampled_from(["seed", "stages.x", "name", "a.b.c"]), st.text())
)
def test_garbage_overrides(tmp_path, override):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    _load_or_one_line(path, [override])


def _load_or_one_line(path, overrides=()):
    try:
        assert isinstance(load_recipe(path, overrides), Recipe)
    except RecipeError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
