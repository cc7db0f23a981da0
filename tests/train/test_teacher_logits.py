"""Stored teacher logits: the right numbers, the same training, one writer, damage found."""

import errno
import itertools
import json
import math
import os
import shutil
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gowide_dist import load_recipe
from gowide_dist.data.encode import encode
from gowide_dist.errors import RecipeError, RunError
from gowide_dist.files import try_lock
from gowide_dist.networks.teacher import Teacher
from gowide_dist.pipeline import walk
from gowide_dist.prepare import prepare
from gowide_dist.run import Run, read_metrics
from gowide_dist.stop import Stopped
from gowide_dist.train import start, student, teacher_logits
from gowide_dist.train.losses import kl_divergence
from gowide_dist.train.objectives import Kl
from gowide_dist.train.teacher_logits import TeacherOutput, compress, merge_tail
from tests.command import gowide, killed_when
from tests.fashion import chain, encode_part, train, write_job

STORED = "stages.distill.teacher_logits=stored"
BARE = "stages.distill.init=null"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return encode_part(tmp_path_factory.mktemp("fashion"), 240, 100)


@pytest.fixture(scope="module")
def taught(data, tmp_path_factory):
    """A folder of runs with one that has trained a teacher."""
    runs = tmp_path_factory.mktemp("runs")
    train(runs, chain(data, name="taught"), "teacher")
    return runs


@pytest.fixture
def distill(data, taught, tmp_path):
    """Distil from that teacher in this process, with overrides; the run. Each test has its own folder of runs."""
    shutil.copytree(taught / "taught", tmp_path / "runs" / "taught")
    count = itertools.count()

    def run(*overrides, name=None, runs=tmp_path / "runs"):
        if not (runs / "taught").exists():
            shutil.copytree(taught / "taught", runs / "taught")
        given = [BARE, f"name={name or f'run-{next(count)}'}", "stages.teacher.seed=0", *overrides]
        prepared = prepare(load_recipe(write_job(tmp_path, chain(data)), given), runs, only=["distill"])
        walk(prepared.run, [instance.key for instance in prepared.unfinished])
        return prepared.run

    return run


def done(run):
    return run.stage("distill/thin").done


def losses(run):
    return [line["loss"] for line in read_metrics(run.stage("distill/thin").metrics)]


def folder_of(run):
    (folder,) = run.teacher_logits.iterdir()
    return folder


def arrays(run):
    return {path.stem: np.load(path) for path in folder_of(run).glob("*.npy")}


def contents(run):
    return {path.name: path.read_bytes() for path in folder_of(run).iterdir()}


def no_teacher(monkeypatch):
    """From now on nobody may load or run a teacher."""

    def forbidden(*arguments, **options):
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(Teacher, "logits", forbidden)
    monkeypatch.setattr(start, "load_trained", forbidden)


def test_the_merged_tail_by_hand():
    """p = (1/2, 1/4, 1/4) becomes (1/2, 1/2), and at T = 2 the tail's probability is that of its sum of exp(z / 2)."""
    logits = torch.tensor([[math.log(4.0), math.log(2.0), math.log(2.0)]])
    best = torch.tensor([[0]])
    assert merge_tail(logits, best, 1.0).softmax(dim=1).tolist() == [pytest.approx([0.5, 0.5])]
    root = math.sqrt(2)
    assert (merge_tail(logits, best, 2.0) / 2).softmax(dim=1)[0, 0].item() == pytest.approx(2 / (2 + 2 * root))
    assert merge_tail(logits, None, 2.0) is not None
    assert torch.equal(merge_tail(logits, None, 2.0), logits)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_from_stored_logits(temperature):
    """All classes: the live loss to half precision. The k best: less by the tail's probability times its divergence."""
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 20, requires_grad=True), 6 * torch.randn(64, 20)
    live = kl_divergence(student, teacher, temperature)
    whole = compress(teacher, None, temperature)
    assert whole.values.dtype == torch.float16
    assert torch.allclose(kl_divergence(student, whole.values, temperature), live, rtol=2e-3, atol=2e-3)

    kept = compress(teacher, 5, temperature)
    assert kept.values.shape == (64, 6)
    loss = kl_divergence(merge_tail(student, kept.classes, temperature), kept.values, temperature)
    others = torch.ones(64, 20, dtype=torch.bool).scatter(1, kept.classes.long(), False)
    p, q = (F.softmax(logits / temperature, dim=1)[others].view(64, 15) for logits in (teacher, student))
    mass = p.sum(dim=1)
    p, q = p / mass[:, None], q / q.sum(dim=1, keepdim=True)
    within = mass * (p * (p / q).log()).sum(dim=1)
    assert torch.allclose(loss, live - temperature**2 * within, rtol=2e-3, atol=3e-3)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all()
    assert gradient[others].abs().sum() > 0  # the student's tail is pushed to the teacher's probability


def test_a_stored_stage_learns_as_a_live_one(distill):
    live, stored = distill(), distill(STORED)
    assert losses(stored) == pytest.approx(losses(live), rel=2e-3)
    assert done(stored).stream == done(live).stream
    assert done(stored).fingerprint != done(live).fingerprint
    assert done(stored).top1 == pytest.approx(done(live).top1, abs=2)
    both = "stages.distill.labels_weight=0.5"
    assert losses(distill(STORED, both)) == pytest.approx(losses(distill(both)), rel=2e-3)


def test_of_mixed_images_the_answers_to_the_mixed_are_stored(distill):
    settings = ("mixup=0.4", "cutmix=1", "labels_weight=0.5", "optim.accumulate=2")
    mixed = [f"stages.distill.{setting}" for setting in settings]
    live, stored = distill(*mixed), distill(STORED, *mixed)
    assert losses(stored) == pytest.approx(losses(live), rel=2e-3)
    assert done(stored).stream == done(live).stream
    assert losses(stored) != pytest.approx(losses(distill()), rel=2e-2)


def test_an_unmixed_stream_keeps_its_name(distill, monkeypatch):
    """Its description does not speak of mixing, so that what was stored before is still found."""
    description = json.loads((folder_of(distill(STORED)) / "logits.json").read_text())
    assert not {"mixup", "cutmix"} & description["metadata"].keys()


def test_the_teacher_runs_once_for_all_students_of_a_stream(distill, monkeypatch):
    """Several seeds, temperatures and weights of the labels: stored once, and the teacher is not even loaded again."""
    first = distill(STORED, "data.seed=0", "seed=1")
    before = (folder_of(first) / "logits.json").stat().st_mtime_ns
    no_teacher(monkeypatch)
    second = distill(STORED, "data.seed=0", "seed=2")
    assert done(second).stream == done(first).stream
    assert done(second).model_sha256 != done(first).model_sha256  # a seed of its own for the weights
    assert done(distill(STORED, "data.seed=0", "seed=3", "stages.distill.temperature=1"))
    assert done(distill(STORED, "data.seed=0", "stages.distill.labels_weight=0.5"))
    assert (folder_of(first) / "logits.json").stat().st_mtime_ns == before
    with pytest.raises(AssertionError, match="the teacher ran"):
        distill(STORED, "data.seed=1")


@pytest.mark.parametrize(
    "override",
    [
        "seed=5",
        "data.seed=5",
        "precision=bf16",
        "stages.distill.epochs=1",
        "stages.distill.top_k=3",
        "stages.distill.mixup=0.4",
        "stages.distill.cutmix=1",
    ],
)
def test_another_stream_is_stored_by_itself(distill, override):
    run = distill(STORED)
    assert done(distill(STORED, override))
    assert len(list(run.teacher_logits.iterdir())) == 2


def test_a_stream_seed_is_part_of_what_a_stage_is_only_where_it_counts(distill):
    plain, same, other = distill(), distill("data.seed=0"), distill("data.seed=5", "stages.teacher.seed=5")
    assert done(same).fingerprint == done(plain).fingerprint
    assert done(other).fingerprint != done(plain).fingerprint
    assert done(other).stream != done(plain).stream


def test_the_best_classes_and_the_tail_are_stored(distill):
    """240 images in batches of 60 for 2 epochs, 100 validation images: what is stored are the teacher's logits."""
    run = distill(STORED, "stages.distill.top_k=3")
    kept = arrays(run)
    assert {name: array.shape for name, array in kept.items()} == {
        "values": (480, 4), "classes": (480, 3), "val_values": (100, 4), "val_classes": (100, 3)}  # fmt: skip
    whole = arrays(distill(STORED, runs=run.path.parent.parent / "all"))
    for prefix in ("", "val_"):
        logits = torch.from_numpy(whole[f"{prefix}values"]).float()
        classes = torch.from_numpy(kept[f"{prefix}classes"]).long()
        expected = merge_tail(logits, classes, 4.0)
        assert torch.allclose(torch.from_numpy(kept[f"{prefix}values"]).float(), expected, rtol=1e-2, atol=1e-2)
        assert torch.allclose(logits.topk(3).values, expected[:, :3])
    assert kept["classes"].dtype == np.int16
    description = json.loads((folder_of(run) / "logits.json").read_text())
    assert description["metadata"]["top_k"] == 3
    assert [sorted(block) for block in description["sha256"]] == [
        ["classes", "values"], ["classes", "values"], ["val_classes", "val_values"]]  # fmt: skip
    assert done(run).top1 > 0


@pytest.mark.parametrize(
    ("option", "at"),
    [
        ([], "storing"),
        (["stages.distill.top_k=3", "stages.distill.optim={lr: 0.05, ema: 0.9, accumulate: 2}"], "storing"),
        (["stages.distill.labels_weight=0.3"], "training"),
    ],
)
def test_restarts_are_exact(distill, monkeypatch, tmp_path, option, at):
    undisturbed = distill(STORED, *option)
    again = {"name": "cut", "runs": tmp_path / "elsewhere"}

    class PowerCut(BaseException):
        pass

    asked = itertools.count()
    ask, save = Teacher.logits, student.save_checkpoint

    def ask_and_fail(self, images):
        if next(asked) == 6:  # in the second epoch
            raise PowerCut
        return ask(self, images)

    def save_and_fail(folder, state, *, step, **rest):
        save(folder, state, step=step, **rest)
        if step == 6:
            raise PowerCut

    if at == "storing":
        monkeypatch.setattr(Teacher, "logits", ask_and_fail)
    else:
        monkeypatch.setattr(student, "save_checkpoint", save_and_fail)
    with pytest.raises(PowerCut):
        distill(STORED, *option, **again)
    monkeypatch.setattr(student, "save_checkpoint", save)
    asked = itertools.count(100)
    run = distill(STORED, *option, **again)
    if at == "storing":
        assert next(asked) - 100 == 4 + 2  # the second epoch, the validation images: not the first epoch again
    assert done(run).model_sha256 == done(undisturbed).model_sha256
    assert contents(run) == contents(undisturbed)


@pytest.mark.parametrize("name", ["values.npy", "val_values.npy"])
@pytest.mark.parametrize("harm", ["flipped bit", "truncated", "no header", "another header", "missing"])
def test_damage_is_found(distill, name, harm):
    folder = folder_of(distill(STORED))
    path = folder / name
    content = bytearray(path.read_bytes())
    if harm == "flipped bit":
        content[-1] ^= 1
    elif harm == "truncated":
        del content[-100:]
    elif harm == "no header":
        content[:100] = bytes(100)
    elif harm == "another header":
        content = content.replace(b"f2", b"i2")
    path.write_bytes(content)
    if harm == "missing":
        path.unlink()
    with pytest.raises(RunError, match=rf"{folder}/{name}: damaged; delete {folder}, and the same"):
        distill(STORED, "seed=9", "data.seed=0")
    shutil.rmtree(folder)
    assert done(distill(STORED, "seed=9", "data.seed=0"))


def test_a_damaged_description_is_found(distill):
    folder = folder_of(distill(STORED))
    (folder / "logits.json").write_text("{")
    with pytest.raises(RunError, match=rf"{folder}/logits.json: damaged; delete {folder}"):
        distill(STORED, "seed=9", "data.seed=0")


def test_a_block_is_hashed_once_and_by_whoever_reads_it(distill, monkeypatch):
    """Nobody waits for minutes at the start: an epoch is verified when its first row is read, the validation set before
    an epoch is spent."""
    folder = folder_of(distill(STORED))
    layout = teacher_logits.Layout(2, 240, 100, 10, None, 1.0)
    hashed, sha256 = [], teacher_logits.hashlib.sha256
    monkeypatch.setattr(teacher_logits.hashlib, "sha256", lambda data: (hashed.append(data.shape), sha256(data))[1])
    stored = teacher_logits.TeacherLogits(folder, layout)
    assert hashed == [(100, 10)]
    stored.train(250, 60)
    stored.train(300, 60)
    stored.val(50, 50)
    assert hashed == [(100, 10), (240, 10)]


def test_a_disk_that_is_too_small_is_found_before_the_teacher_runs(distill, monkeypatch):
    no_teacher(monkeypatch)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((1, 1000, 9, 9, 9, 0, 0, 0, 0, 255)))
    with pytest.raises(
        RunError, match=r"the teacher's logits take 0.0 GB more, 0.0 GB are free; free disk space, or store"
    ):
        distill(STORED)


def test_a_disk_that_fills_up_ends_with_an_error_and_the_epochs_before_are_kept(distill, monkeypatch, tmp_path):
    """A quota, which statvfs does not see."""
    undisturbed = distill(STORED)
    again = {"name": "cut", "runs": tmp_path / "elsewhere"}
    write, written = teacher_logits.HashingFile.write, itertools.count()

    def full(self, content):
        if next(written) == 6:  # in the second epoch
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return write(self, content)

    monkeypatch.setattr(teacher_logits.HashingFile, "write", full)
    with pytest.raises(OSError, match="quota"):
        distill(STORED, **again)
    assert contents(distill(STORED, **again)) == contents(undisturbed)


def test_one_writes_the_other_waits(distill, monkeypatch):
    """While another job has the lock this one waits, hears signals, and in the end uses what the other has left."""
    folder = folder_of(distill(STORED))
    description = folder / "logits.json"
    hidden = description.rename(folder / "hidden")
    no_teacher(monkeypatch)
    monkeypatch.setattr(teacher_logits, "WAIT_S", 0.01)
    with try_lock(folder / "lock") as locked:
        assert locked
        with monkeypatch.context() as told:
            told.setattr("gowide_dist.stop._received", 10)
            with pytest.raises(Stopped):
                distill(STORED, "seed=3", "data.seed=0", name="waits")
        writer = threading.Timer(0.3, lambda: hidden.rename(description))
        writer.start()
        assert done(distill(STORED, "seed=3", "data.seed=0", name="waits"))
    writer.join()


def test_stored_by_two_processes(distill, data, taught, tmp_path):
    """As by one, but for rounding: the same rows in the same places, also when killed while it stores."""
    one = distill(STORED)
    runs = tmp_path / "two"
    shutil.copytree(taught / "taught", runs / "taught")
    run = Run(runs / "chain")
    command = ("run", write_job(tmp_path, chain(data)), BARE, STORED, "stages.teacher.seed=0", "--only", "distill")
    killed_when(lambda: any(run.teacher_logits.glob("*/values.npy")), *command, "--runs", runs, "--nproc", 2)
    result = gowide(*command, "--runs", runs, "--nproc", 2)
    assert result.returncode == 0, result.stderr
    assert "stored the teacher's logits" in result.stdout
    assert done(run).stream == done(one).stream
    by_two = arrays(run)
    for name, values in arrays(one).items():
        assert np.allclose(by_two[name].astype(float), values.astype(float), rtol=1e-2, atol=1e-2), name
    assert losses(run)[0] == pytest.approx(losses(one)[0], rel=0.2)  # batch norms see half batches


def test_images_that_grow_have_logits_of_their_size(monkeypatch, tmp_path):
    """The stream that is stored is the stream that is trained on: epoch by epoch in its resolution."""
    seen = {"asked": [], "trained": []}
    ask, train = Teacher.logits, Kl.forward
    monkeypatch.setattr(Teacher, "logits", lambda self, x: (seen["asked"].append(x), ask(self, x))[1])
    monkeypatch.setattr(Kl, "forward", lambda self, x, *rest: (seen["trained"].append(x), train(self, x, *rest))[1])
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for index in range(count):
            path = tmp_path / "images" / split / str(index % 4) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (50, 60, 3), np.uint8)).save(path)
    encode("imagefolder", tmp_path / "out", tmp_path / "images")
    files = {name: str(tmp_path / "out" / f"{name}.beton") for name in ("train", "val")}
    stages = chain(tmp_path)["stages"]
    stages["teacher"]["epochs"] = 1
    stages["distill"] |= {"init": None, "teacher_logits": "stored", "ramp": {"start_px": 16, "until_epoch": 1}}
    crop = {"resolution": 32, "augment": {"flip": True, "crop": {}}, "center_crop": 1.0}
    recipe = load_recipe(write_job(tmp_path, chain(tmp_path, data=files | crop, batch_size=8, stages=stages)))
    prepared = prepare(recipe, tmp_path / "runs", only=["distill"])
    walk(prepared.run, [instance.key for instance in prepared.unfinished])
    assert [x.shape[-1] for x in seen["trained"]] == [16] * 3 + [32] * 3
    assert all(torch.equal(a, t) for a, t in zip(seen["asked"], seen["trained"], strict=False))


def test_what_does_not_fit_is_refused(distill):
    with pytest.raises(RecipeError, match="top_k: needs teacher_logits: stored"):
        distill("stages.distill.top_k=3")
    with pytest.raises(RecipeError, match=r"stages.distill.top_k: 10 of 10 classes; leave it out to keep all"):
        distill(STORED, "stages.distill.top_k=10")


def test_outputs_are_cut_into_equal_parts():
    whole = TeacherOutput(torch.arange(8.0).view(4, 2), torch.arange(4).view(4, 1))
    assert [part.values.tolist() for part in whole.chunk(2)] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert [part.classes.tolist() for part in whole.chunk(2)] == [[[0], [1]], [[2], [3]]]
