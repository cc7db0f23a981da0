"""The training loop in this process alone: every option does what it says, and none breaks an exact restart."""

import errno
import itertools
import json
import shutil
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gowide_dist
from gowide_dist import load_model, load_recipe
from gowide_dist.data.encode import encode
from gowide_dist.data.idx import read_idx
from gowide_dist.data.info import read_dataset_info
from gowide_dist.data.loader import Loader
from gowide_dist.errors import RecipeError, RunError
from gowide_dist.files import sha256
from gowide_dist.identity import fingerprint
from gowide_dist.networks import weights
from gowide_dist.pipeline import walk
from gowide_dist.prepare import check_group, prepare
from gowide_dist.run import Run, read_metrics
from gowide_dist.timeline import Batching
from gowide_dist.train import checkpoint, loop, start, student
from gowide_dist.train.checkpoint import whole_checkpoints
from gowide_dist.train.costs import network_cost
from gowide_dist.train.losses import kl_divergence
from gowide_dist.train.objectives import Labels
from gowide_dist.train.student import TrainingError
from tests.fashion import SOURCE, chain, encode_part, write_job


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return encode_part(tmp_path_factory.mktemp("fashion"), 240, 100)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories that take over from each other what is equal: a teacher is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def train(data, runs, tmp_path):
    """Train stages of the tiny chain with overrides, in this process; the run."""
    count = itertools.count()

    def run(*overrides, only=("teacher",), name=None, into=None, **changes):
        name = name or f"{tmp_path.name}-{next(count)}"
        recipe = load_recipe(write_job(tmp_path, chain(data, **changes)), [f"name={name}", *overrides])
        prepared = prepare(recipe, into or runs, only=only)
        walk(prepared.run, [instance.key for instance in prepared.unfinished])
        return prepared.run

    return run


def sha(run, key="teacher/wide"):
    return run.stage(key).done.model_sha256


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1"],
        ["stages.teacher.seed=1"],
        ["data.augment.flip=false"],
        ["data.augment.translate=3"],
        ["data.augment.trivial_augment=true"],
        ["data.augment.rand_augment={}"],
        ["data.augment.color_jitter={brightness: 0.4}"],
        ["data.augment.erase=0.5"],
        ["batch_size=48"],
        ["precision=bf16"],
        ["stages.teacher.label_smoothing=0.1"],
        ["stages.teacher.class_weights=balanced"],
        ["stages.teacher.mixup=0.2"],
        ["stages.teacher.cutmix=1"],
        ["stages.teacher.schedule=linear"],
        ["stages.teacher.schedule=constant"],
        ["stages.teacher.schedule.warmup_epochs=1"],
        ["stages.teacher.schedule={milestones: [1]}"],
        ["stages.teacher.optim.momentum=0.8"],
        ["stages.teacher.optim.nesterov=true"],
        ["stages.teacher.optim.weight_decay=0.01"],
        ["stages.teacher.optim.clip_norm=0.5"],
        ["stages.teacher.optim.accumulate=2"],
        ["stages.teacher.optim.ema=0.9"],
        ["networks.thin.zero_init_residual=true"],
        ["networks.thin.normalise=imagenet"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_option_changes_the_weights(train, overrides):
    assert sha(train(*overrides)) != sha(train())


def test_fp16_scales_its_loss(train):
    """On a CPU fp16 is no faster, but it trains, and its scaled gradients leave the loss where float32 has it."""
    half, plain = train("precision=fp16"), train()
    assert sha(half) != sha(plain)
    last = [read_metrics(run.stage("teacher/wide").metrics)[-1]["loss"] for run in (half, plain)]
    assert last[0] == pytest.approx(last[1], rel=0.2)


def test_a_factor_of_the_step_schedule_counts(train):
    steps = "stages.teacher.schedule={milestones: [1], factor: 0.5}"
    assert sha(train(steps)) != sha(train("stages.teacher.schedule={milestones: [1]}"))


def test_decay_of_norms_counts(train):
    decay = "stages.teacher.optim.weight_decay=0.01"
    assert sha(train(decay, "stages.teacher.optim.decay_norms=false")) != sha(train(decay))


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("imitate/thin", ["stages.imitate.order=joint"]),
        ("imitate/thin", ["stages.imitate.inputs=teacher"]),
        ("imitate/thin", ["stages.imitate.prefix=trained"]),
        ("imitate/thin", ["stages.imitate.classifier=fresh"]),
        ("imitate/thin", ["stages.imitate.start=teacher"]),
        ("imitate/thin", ["stages.imitate.start=pruned"]),
        ("distill/thin", ["stages.distill.temperature=1"]),
        ("distill/thin", ["stages.distill.labels_weight=0.5"]),
        ("distill/thin", ["stages.distill.loss=dkd"]),
        ("distill/thin", ["stages.distill.loss=dist"]),
        ("distill/thin", ["stages.distill.standardise=true"]),
        ("distill/thin", ["stages.distill.blocks_weight=1"]),
        ("distill/thin", ["stages.distill.init=null"]),
        ("distill/thin", ["stages.distill.init=null", "stages.distill.start=teacher"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_options_of_imitation_and_distillation_change_the_weights(train, key, overrides):
    stage_name = key.partition("/")[0]
    plain = train(only=[stage_name])  # the teacher is taken from the other run
    assert sha(train(*overrides, only=[stage_name]), key) != sha(plain, key)


def test_what_cannot_change_the_weights_does_not(train):
    plain = train()
    other = train("log_every_steps=1", "eval_every_epochs=2", "checkpoints.every_steps=2", "checkpoints.keep=1")
    assert sha(other) == sha(plain)
    assert other.stage("teacher/wide").done.fingerprint == plain.stage("teacher/wide").done.fingerprint


class ScalarReads(TorchDispatchMode):
    """Counts `.item()`, `float(tensor)` and their like, for each of which the host waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(train, monkeypatch):
    """In training no scalar is read but where averages are recorded and where the network is evaluated."""
    reads, elsewhere = ScalarReads(), []

    def counted(method):
        def call(*args):
            with reads:
                return method(*args)

        return call

    def uncounted(method):
        def call(*args):
            before = reads.count
            result = method(*args)
            elsewhere.append(reads.count - before)
            reads.count = before
            return result

        return call

    training = loop.StageTraining
    monkeypatch.setattr(training, "_train_phase", counted(training._train_phase))
    for name in ("_record", "_evaluate"):
        monkeypatch.setattr(training, name, uncounted(getattr(training, name)))
    busy = ["stages.teacher.optim.clip_norm=1", "stages.teacher.optim.ema=0.9", "stages.teacher.mixup=0.2"]
    train("seed=1", *busy, "checkpoints.every_steps=null", only=["distill"])
    assert sum(elsewhere) > 0, "reads are seen where there are some"
    assert reads.count == 0


def test_accumulation_equals_the_big_batch(train, monkeypatch):
    """With batch norms in eval mode, for their statistics are those of a part."""
    monkeypatch.setattr(Labels, "train", lambda self, mode=True: nn.Module.train(self, False))
    whole = load_model(train("seed=7").path, "teacher")  # a seed of its own: nothing is taken over
    parts = load_model(train("seed=7", "stages.teacher.optim.accumulate=4").path, "teacher")
    first = next(whole.parameters())
    assert not torch.equal(first, next(parts.parameters()))  # another order of additions
    for mine, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("teacher/wide", ["precision=fp16", "stages.teacher.optim={lr: 0.05, clip_norm: 1, ema: 0.9, accumulate: 2}"]),
        ("teacher/wide", ["precision=bf16", "stages.teacher.mixup=0.4", "stages.teacher.cutmix=1",
                          "stages.teacher.optim.nesterov=true"]),
        ("teacher/wide", ["data.augment={flip: true, rand_augment: {}, color_jitter: {contrast: 0.4}, erase: 0.5}"]),
        ("imitate/thin", ["networks.thin.channels=0.5", "networks.wide={block: bottleneck, depths: [1, 1], base: 4, "
                          "stem: strided}", "stages.imitate.prefix=trained"]),
        ("imitate/thin", ["stages.imitate.order=joint", "stages.imitate.inputs=teacher"]),
        ("distill/thin", ["stages.distill.labels_weight=0.3", "stages.distill.optim.ema=0.5", "stages.distill.cutmix=1"]),
        ("distill/thin", ["stages.distill={loss: dist, standardise: true, blocks_weight: 1, start: pruned, train: thin, "
                          "objective: kl, teacher: teacher, epochs: 2, optim: {lr: 0.05, accumulate: 2}}"]),
    ],
)  # fmt: skip
def test_restarts_are_exact_with_every_option(train, monkeypatch, tmp_path, key, overrides):
    stage_name = key.partition("/")[0]
    undisturbed = train(*overrides, only=[stage_name])
    save = student.save_checkpoint

    def save_and_fail(folder, state, *, step, **rest):
        save(folder, state, step=step, **rest)
        if step == 6:
            raise PowerCut

    again = {"only": [stage_name], "name": "cut", "into": tmp_path / "elsewhere"}
    shutil.copytree(undisturbed.path, tmp_path / "elsewhere" / "parents")
    shutil.rmtree(tmp_path / "elsewhere" / "parents" / "stages" / key)
    monkeypatch.setattr(student, "save_checkpoint", save_and_fail)
    with pytest.raises(PowerCut):
        train(*overrides, **again)
    monkeypatch.setattr(student, "save_checkpoint", save)
    assert sha(train(*overrides, **again), key) == sha(undisturbed, key)


def test_checkpoints_are_snapshots_written_while_training_goes_on(train, monkeypatch, tmp_path):
    """Step 3 is written only after step 5: what lies there is the state of step 3, and the end is the same."""
    overrides = ["stages.teacher.optim={lr: 0.05, ema: 0.9}"]
    undisturbed = train(*overrides)
    save, update, later = student.save_checkpoint, student.Student.update, threading.Event()
    steps = itertools.count(1)

    def slow_save(*arguments, step, **rest):
        assert later.wait(60), "training waits for a checkpoint to be written"
        save(*arguments, step=step, **rest)
        raise PowerCut

    def count(self, *arguments):
        update(self, *arguments)
        if next(steps) == 5:
            later.set()

    again = {"name": "cut", "into": tmp_path / "elsewhere"}
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(student, "save_checkpoint", slow_save)
        patch.setattr(student.Student, "update", count)
        train(*overrides, **again)
    cut = Run(tmp_path / "elsewhere" / "cut").stage("teacher/wide")
    assert whole_checkpoints(cut.checkpoints, fingerprint(cut.read_identity())) == [3]
    assert sha(train(*overrides, **again)) == sha(undisturbed)


def test_a_checkpoint_that_cannot_be_written_stops_training(train, monkeypatch, tmp_path):
    """At the next step, with the error of the file system; nothing is written after it, nothing is finished."""

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "atomic", full)
    with pytest.raises(OSError, match="No space left"):
        train(name="full", into=tmp_path / "elsewhere")
    place = Run(tmp_path / "elsewhere" / "full").stage("teacher/wide")
    assert place.done is None
    assert not list(place.checkpoints.iterdir())


def test_thin_in_all_channels(train):
    """A student with half the channels of its teacher's blocks imitates through transforms; what is left is plain."""
    wide = {"block": "bottleneck", "depths": [1, 1], "base": 8, "stem": "strided", "width": 2}
    thin = {**wide, "channels": 0.5, "width": 1}
    run = train(only=["imitate"], networks={"wide": wide, "thin": thin})
    student = load_model(run.path, "imitate")
    assert student.architecture.block_channels == (16, 32)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    assert parameters == network_cost(student.architecture, 10, 28).parameters
    errors = [line for line in read_metrics(run.stage("imitate/thin").metrics) if line["kind"] == "val"]
    assert errors[-1]["mse_block1"] < errors[0]["mse_block1"] * 1.05


def test_compiled_training(train):
    """torch.compile changes rounding alone."""
    one = ["stages.teacher.epochs=1", "data.augment.flip=false"]
    plain = train(*one)
    torch._dynamo.utils.counters.clear()
    compiled = train("compile=true", *one)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.stage("teacher/wide").done.fingerprint != plain.stage("teacher/wide").done.fingerprint
    for mine, theirs in zip(*(load_model(run.path, "teacher").parameters() for run in (compiled, plain)), strict=True):
        assert torch.allclose(mine, theirs, rtol=0.05, atol=1e-3)


def test_synchronised_batch_norm(train, monkeypatch):
    """Every norm is one that synchronises; in a process alone that changes nothing."""
    trained = []

    class Watched(student.Student):
        def __init__(self, instance, objective, *rest):
            trained.append(objective)
            super().__init__(instance, objective, *rest)

    monkeypatch.setattr(start, "Student", Watched)
    plain, synchronised = train("stages.teacher.epochs=1"), train("sync_batch_norm=true", "stages.teacher.epochs=1")
    norms = [
        [module for module in one.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)] for one in trained
    ]
    assert [{type(module) for module in found} for found in norms] == [{nn.BatchNorm2d}, {nn.SyncBatchNorm}]
    assert len(norms[0]) == len(norms[1]) > 0
    assert sha(synchronised) == sha(plain)
    assert synchronised.stage("teacher/wide").done.fingerprint != plain.stage("teacher/wide").done.fingerprint


def test_synchronised_batch_norm_of_several_processes_needs_gpus(data, tmp_path):
    recipe = load_recipe(write_job(tmp_path, chain(data)), ["sync_batch_norm=true"])
    check_group(recipe, 1, on_gpus=False)
    check_group(recipe, 2, on_gpus=True)
    with pytest.raises(RecipeError, match="PyTorch has it for GPUs only, and the 2 processes have none"):
        check_group(recipe, 2, on_gpus=False)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_public_network_is_the_teacher(train, tmp_path, suffix):
    torch.manual_seed(0)
    public = torchvision.models.resnet18(num_classes=10)
    file = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(public.state_dict(), file)
    else:
        from safetensors.torch import save_file

        save_file(public.state_dict(), file)
    networks = {"wide": {"arch": "resnet18"}, "thin": {"arch": "resnet18", "width": 0.25}}
    stages = chain(tmp_path)["stages"]
    stages["teacher"] = {"train": "wide", "objective": "labels", "epochs": 0, "init": {"file": str(file)}}
    run = train(only=["imitate"], networks=networks, stages=stages)
    taken = load_model(run.path, "teacher").state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in public.state_dict().items())
    done = run.stage("teacher/wide").done
    assert (done.steps, done.images, done.epochs) == (0, 0, 0)
    student = load_model(run.path, "imitate")
    assert torch.equal(student.fc.weight, public.fc.weight)


def test_a_file_of_another_network_names_what_does_not_fit(train, tmp_path, capsys):
    """Before anything is written. With a fresh classifier weights for other classes are a start."""
    networks = {"wide": {"block": "basic", "depths": [1, 1], "base": 4}}
    public = gowide_dist.build_network(networks["wide"], 7).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in public.items()}}, tmp_path / "other.pth")
    init = {"file": str(tmp_path / "other.pth")}
    optim = {"lr": 0.05}
    stages = {"teacher": {"train": "wide", "objective": "labels", "epochs": 1, "optim": optim, "init": init}}
    with pytest.raises(
        RunError, match=r"stages.teacher.init.file: .*other.pth: of 7 classes, here are 10; init: .*fresh"
    ):
        train(networks=networks, stages=stages, into=tmp_path / "runs", name="other")
    assert not (tmp_path / "runs").exists()
    init["classifier"] = "fresh"
    run = train("stages.teacher.optim.lr=1e-9", networks=networks, stages=stages)
    assert (
        f"note: teacher/wide: takes the weights of {init['file']} that are named state_dict.*"
        in capsys.readouterr().err
    )
    taken = load_model(run.path, "teacher").state_dict()
    assert torch.allclose(taken["layer2.0.conv1.weight"], public["layer2.0.conv1.weight"], atol=1e-5)
    assert taken["fc.weight"].shape == (10, 8)
    identity = json.loads((run.stage("teacher/wide").path / "identity.json").read_text())
    assert identity["init"] == {"file": sha256(tmp_path / "other.pth"), "classifier": "fresh"}
    line = r"stages.teacher.init.classifier was \"fresh\", is its default"
    with pytest.raises(RunError, match=line):
        torch.save(gowide_dist.build_network(networks["wide"], 10).state_dict(), tmp_path / "other.pth")
        del init["classifier"]
        train(networks=networks, stages=stages, name=run.path.name)
    (tmp_path / "other.pth").write_bytes(b"no weights")
    runs = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=r"stages.teacher.init.file: .*other.pth: holds no weights, or not all"):
        train(networks=networks, stages=stages)
    assert sorted(tmp_path.rglob("*")) == runs
    with pytest.raises(RunError, match=r"other.pth: holds no weights, or not all"):
        weights.load_weights(tmp_path / "other.pth", gowide_dist.build_network({"arch": "resnet18"}, 10))
    (tmp_path / "other.pth").unlink()
    with pytest.raises(RunError, match=r"stages.teacher.init.file: .*other.pth: cannot be read"):
        train(networks=networks, stages=stages)


@pytest.mark.parametrize("logits", ["live", "stored"])
def test_each_network_has_its_own_normalisation(train, data, tmp_path, logits):
    """Teacher and students of one stage, in training and in validation; it lies with the weights."""
    networks = chain(data)["networks"] | {"half": {"widen": "thin", "by": 1, "normalise": {"mean": 0.5, "std": 0.25}}}
    networks["wide"]["normalise"] = "imagenet"
    stages = chain(data)["stages"]
    distill = {
        "train": ["thin", "half"],
        "objective": "kl",
        "teacher": "teacher",
        "teacher_logits": logits,
        "mixup": 0.2,
        "epochs": 1,
    }
    stages = {"teacher": stages["teacher"], "distill": {**distill, "optim": {"lr": 0.05, "accumulate": 2}}}
    seen = []

    def recording(student, batch, *rest):
        seen.append({name: (view.images.clone(), view.labels.lam.clone()) for name, view in batch.items()})
        return forward_backward(student, batch, *rest)

    forward_backward = student.Student.forward_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student.Student, "forward_backward", recording)
        run = train(only=["distill"], networks=networks, stages=stages)
    info = read_dataset_info(data / "train.beton")
    for views in seen[-4:]:  # of the distillation
        assert len(views) == (3 if logits == "live" else 2)
        pixels = [
            images * torch.tensor(name.std or info.std)[:, None, None]
            + torch.tensor(name.mean or info.mean)[:, None, None]
            for name, (images, _) in views.items()
        ]
        assert all(torch.allclose(pixels[0], other, atol=1e-5) for other in pixels)
        assert len({tuple(lam.tolist()) for _, lam in views.values()}) == 1

    with closing(Loader(data / "val.beton", Batching(100), train=False, resolution=28)) as loader:
        batch = next(iter(loader.batches()))
        networks = {
            key: load_model(run.path, *key.split("/")) for key in ("teacher/wide", "distill/thin", "distill/half")
        }
        with torch.inference_mode():
            answers = {key: each(each.preprocessing(*batch.images.numpy()))[0] for key, each in networks.items()}
    assert networks["teacher/wide"].preprocessing.mean == (0.485, 0.456, 0.406)
    assert networks["distill/thin"].preprocessing.std == info.std
    assert networks["distill/half"].preprocessing.std == (0.25, 0.25, 0.25)
    for key in ("distill/thin", "distill/half"):
        (last,) = [line for line in read_metrics(run.stage(key).metrics) if line["kind"] == "val"]
        expected = kl_divergence(answers[key], answers["teacher/wide"], 1.0).mean().item()
        assert last["loss"] == pytest.approx(expected, rel=1e-4 if logits == "live" else 1e-2)
        assert last["top1"] == pytest.approx(100 * (answers[key].argmax(1) == batch.labels).double().mean().item())


def test_weights_of_a_file_and_how_their_images_are_normalised(train, tmp_path, capsys):
    """Said where they would get others than they expect, as far as their file tells."""
    own = train()
    trained = own.stage("teacher/wide").model
    stage = {"train": "wide", "objective": "labels", "epochs": 0, "init": {"file": str(trained)}}

    def notes(file, *overrides, **changes):
        stage["init"]["file"] = str(file)
        capsys.readouterr()
        train(*overrides, stages={"teacher": stage}, into=tmp_path / "runs", **changes)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]

    assert notes(trained) == []
    other = [
        line.partition(" was trained with mean ")[2] for line in notes(trained, "networks.thin.normalise=imagenet")
    ]
    assert len(other) == 1
    assert other[0].endswith("std [0.229, 0.224, 0.225]; networks.wide.normalise says what it gets")
    torch.save({"model": load_model(own.path, "teacher").state_dict()}, tmp_path / "public.pth")
    gets = "get images normalised by the dataset's own mean and standard deviation"
    hint = "published ones mostly expect networks.wide.normalise: imagenet"
    takes = f"note: teacher/wide: takes the weights of {tmp_path / 'public.pth'} that are named model.*"
    assert notes(tmp_path / "public.pth") == [
        takes,
        f"note: teacher/wide: the weights of {tmp_path / 'public.pth'} {gets}; {hint}",
    ]
    assert notes(tmp_path / "public.pth", "networks.wide.normalise=imagenet") == []  # said once
    weights.save_weights(
        tmp_path / "other.safetensors", load_model(own.path, "teacher"),
        load_model(own.path, "teacher").preprocessing.model_copy(update={"classes": tuple("abcdefghij")}).metadata,
    )  # fmt: skip
    with pytest.raises(
        RunError, match=r"classifies a, b ..., the data are T-shirt/top, Trouser ...; classifier: fresh"
    ):
        notes(tmp_path / "other.safetensors")


def test_too_little_memory_is_one_line(train, monkeypatch):
    monkeypatch.setattr(start, "build_network", lambda *_: torch.empty(2**50))
    with pytest.raises(
        TrainingError,
        match=r"teacher/wide: out of memory; wide needs about \d+\.\d\d GB.*; set stages.teacher.optim.accumulate=2, or",
    ):
        train("seed=77", only=["teacher"])
    monkeypatch.setattr(start, "build_network", lambda *_: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train("seed=77", only=["teacher"])


def test_a_stage_seed_shares_a_teacher_between_seeds(train, capsys):
    fixed = "stages.teacher.seed=0"
    first = train(fixed, "seed=0", only=["imitate"])
    second = train(fixed, "seed=1", only=["imitate"])
    assert first.stage("teacher/wide").done.fingerprint == second.stage("teacher/wide").done.fingerprint
    assert sha(first, "imitate/thin") != sha(second, "imitate/thin")


def test_identity_is_readable(train):
    run = train()
    identity = json.loads((run.stage("teacher/wide").path / "identity.json").read_text())
    assert identity["stage"]["optim"]["lr"] == 0.05
    assert identity["network"]["width"] == 2.0
    assert identity["teacher"] is None


def test_images_of_any_size_train_from_a_recipe(train, tmp_path, runs):
    """A folder of JPEGs of many sizes, cropped at random and growing: far above chance."""
    rng = np.random.default_rng(0)
    for prefix, split, count in (("train", "train", 2400), ("t10k", "val", 400)):
        pictures = read_idx(SOURCE / f"{prefix}-images-idx3-ubyte", 3)[:count]
        labels = read_idx(SOURCE / f"{prefix}-labels-idx1-ubyte", 1)[:count]
        for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            path = tmp_path / "images" / split / str(label) / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).resize(tuple(rng.integers(24, 49, 2))).save(path)
    encode("imagefolder", tmp_path / "out", tmp_path / "images")
    files = {name: str(tmp_path / "out" / f"{name}.beton") for name in ("train", "val")}
    crop = {"flip": True, "crop": {"scale": [0.6, 1.0]}}
    data = {**files, "resolution": 32, "augment": crop, "center_crop": 1.0, "order": "quasi-random"}
    stages = chain(tmp_path)["stages"]
    stages["teacher"] |= {"epochs": 5, "ramp": {"start_px": 16, "until_epoch": 2}}
    grown = train(data=data, stages=stages)
    assert grown.stage("teacher/wide").done.top1 > 50
    del stages["teacher"]["ramp"]
    assert sha(train(data=data, stages=stages)) != sha(grown)
