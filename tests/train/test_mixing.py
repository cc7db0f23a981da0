"""Mixup and CutMix: the right pairs, parts and boxes, the same for any number of processes.

`python -m tests.train.test_mixing FOLDER RUN STAGE/NETWORK...` trains, and leaves what its students got in FOLDER.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gowide_dist import build_network, load_recipe, pipeline
from gowide_dist.launch.local import leave, torchrun
from gowide_dist.networks.teacher import Teacher
from gowide_dist.prepare import prepare
from gowide_dist.run import Run
from gowide_dist.stages import KlStage
from gowide_dist.timeline import Batching
from gowide_dist.train import student
from gowide_dist.train.losses import MixedLabels, kl_divergence
from gowide_dist.train.mixing import Mixing, Pairs
from gowide_dist.train.objectives import Kl, Labels
from tests.fashion import chain, encode_part, write_job

SIDE = 12
THIN = {"block": "basic", "depths": [1, 1], "base": 8, "stem": "strided"}
BOTH = [f"stages.{stage}.{setting}" for stage in ("teacher", "distill") for setting in ("mixup=0.4", "cutmix=1")]


@pytest.fixture
def batch():
    torch.manual_seed(3)
    images = torch.randn(8, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (8,))


def by_hand(images, pairs):
    """The mixed images, pixel by pixel."""
    mixed = images.clone()
    for row in range(len(images)):
        own, partner = images[row], images[row ^ 1]
        part, (top, bottom, left, right) = pairs.outside[row // 2], pairs.box[:, row // 2]
        mixed[row] = part * own + (1 - part) * partner
        mixed[row][:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return mixed


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0), (0, 1.0), (0.4, 1.0)])
def test_images_and_labels_by_hand(batch, mixup, cutmix):
    images, labels = batch
    pairs = Mixing(mixup, cutmix, seed=2).pairs(step=5, side=SIDE, batching=Batching(8))
    mixed, targets = pairs.mix(images.clone(memory_format=torch.preserve_format), labels)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(mixed, by_hand(images, pairs), atol=1e-6)
    assert not torch.allclose(mixed, images)
    assert torch.equal(targets.own, labels)
    assert targets.partners.tolist() == [int(labels[row ^ 1]) for row in range(8)]
    if not mixup:  # lambda is the part of the pixels that are left, to the pixel
        kept = (mixed == images).all(dim=1).float().mean(dim=(1, 2))
        assert torch.equal(kept, targets.lam)


def test_a_box_that_is_the_whole_image_is_the_partner_to_the_bit(batch):
    images, labels = batch
    pairs = Pairs(np.ones(4), np.array([[0, SIDE, 0, SIDE]] * 4).T, SIDE)
    mixed, targets = pairs.mix(images.clone(memory_format=torch.preserve_format), labels)
    assert torch.equal(mixed, images.view(4, 2, 3, SIDE, SIDE).flip(1).flatten(0, 1))
    assert targets.lam.tolist() == [0] * 8


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_parts_are_betas(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), each pair its own; CutMix's box cuts as much, but for the border."""
    steps = [Mixing(alpha, 0, seed=1).pairs(step, 224, Batching(512)) for step in range(40)]
    lam = np.concatenate([pairs.lam[::2] for pairs in steps])
    assert len(set(lam[lam < 1 - 1e-6])) > 0.8 * len(lam)
    assert lam.mean() == pytest.approx(0.5, abs=0.02)
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    cut = [Mixing(0, alpha, seed=1).pairs(step, 224, Batching(512)) for step in range(40)]
    inner = np.concatenate([p.lam[::2][(p.box % 224 != 0).all(axis=0)] for p in cut])  # boxes that no border cuts
    everywhere = np.concatenate([p.lam[::2] for p in cut])
    assert inner.min() > 0
    assert everywhere.mean() > 0.55  # the border only ever takes from the box
    half = [Mixing(alpha, alpha, seed=1).pairs(step, 224, Batching(512)) for step in range(40)]
    assert np.mean([p.outside == 1 for p in half]) == pytest.approx(0.5, abs=0.03 + (lam > 1 - 1e-9).mean())


def test_pairs_do_not_depend_on_the_processes_and_change_with_step_and_seed():
    mixing = Mixing(0.4, 1.0, seed=3)
    whole = mixing.pairs(7, 28, Batching(24))
    for number in (2, 3, 4):
        parts = [mixing.pairs(7, 28, Batching(24, number, rank)) for rank in range(number)]
        assert np.array_equal(np.concatenate([part.lam for part in parts]), whole.lam)
        assert np.array_equal(np.concatenate([part.box for part in parts], axis=1), whole.box)
    for other in (mixing.pairs(8, 28, Batching(24)), Mixing(0.4, 1.0, seed=4).pairs(7, 28, Batching(24))):
        assert not np.array_equal(other.lam, whole.lam)
    grown = mixing.pairs(7, 56, Batching(24))  # the same pairs have boxes in larger images
    assert np.array_equal(grown.outside, whole.outside)
    assert grown.lam == pytest.approx(whole.lam, abs=0.15)


def test_labels_by_hand(batch):
    images, labels = batch
    partners, lam = labels.roll(1), torch.linspace(0, 1, 8)
    torch.manual_seed(1)
    objective = Labels(build_network(THIN, 10).eval(), label_smoothing=0.1)
    log_p = objective.student(images)[0].log_softmax(1)
    own, other = (0.9 * F.one_hot(of, 10) + 0.01 for of in (labels, partners))
    soft = lam[:, None] * own + (1 - lam[:, None]) * other
    loss = objective(images, MixedLabels(labels, partners, lam))["loss"]
    assert torch.allclose(loss, -(soft * log_p).sum(1).mean())


def test_the_teacher_answers_the_mixed_image(batch):
    images, labels = batch
    torch.manual_seed(1)
    thin, teacher = build_network(THIN, 10).eval(), Teacher(build_network({**THIN, "width": 2}, 10))
    mixed, targets = Mixing(0.4, 1.0, seed=2).pairs(5, SIDE, Batching(8)).mix(images.clone(), labels)
    stage = {"train": "thin", "objective": "kl", "teacher": "teacher", "epochs": 1, "optim": {"lr": 1}}
    stage |= {"temperature": 2.0, "labels_weight": 0.3}
    losses = Kl(thin, teacher, KlStage.model_validate(stage))(mixed, targets)
    assert torch.allclose(losses["kl"], kl_divergence(thin(mixed)[0], teacher.logits(mixed), 2.0).mean())
    log_p = thin(mixed)[0].log_softmax(1)
    own, other = (-log_p[range(8), of] for of in (labels, labels.view(4, 2).flip(1).flatten()))
    from_labels = (targets.lam * own + (1 - targets.lam) * other).mean()
    assert torch.allclose(losses["cross_entropy"], from_labels)
    assert torch.allclose(losses["loss"], 0.7 * losses["kl"] + 0.3 * from_labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return encode_part(tmp_path_factory.mktemp("fashion"), 240, 100)


def received(data, folder, num_processes, *overrides):
    """What the students of the teacher's and the distillation's stage get, step by step, and the digests."""
    folder.mkdir()
    overrides = ["stages.distill.init=null", "stages.distill.epochs=1", "stages.teacher.epochs=1", *overrides]
    recipe = load_recipe(write_job(folder, chain(data)), overrides)
    prepared = prepare(recipe, folder / "runs", only=["distill"], num_processes=num_processes)
    keys = ["teacher/wide", "distill/thin"]
    torchrun("tests.train.test_mixing", [str(folder), str(prepared.run.path), *keys], num_processes)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]
    steps = [[torch.cat(values) for values in zip(*parts, strict=True)] for parts in zip(*ranks, strict=True)]
    return steps, [Run(prepared.run.path).stage(key).done.stream for key in keys]


def test_two_processes_get_what_one_gets(data, tmp_path):
    one, digests = received(data, tmp_path / "one", 1, *BOTH)
    two, digests_of_two = received(data, tmp_path / "two", 2, *BOTH)
    plain, digests_of_plain = received(data, tmp_path / "plain", 1)
    assert len(one) == len(two) == 8
    for single, joined, unmixed in zip(one, two, plain, strict=True):
        images, own, partners, lam = single
        assert images.shape == (60, 3, 28, 28)
        assert all(map(torch.equal, single, joined))
        assert not torch.equal(images, unmixed[0])
        assert torch.equal(own, unmixed[1])
        assert torch.equal(partners, own.view(-1, 2).flip(1).flatten())
        assert len(lam.unique()) > 10
    assert digests == digests_of_two
    assert all(mixed != unmixed for mixed, unmixed in zip(digests, digests_of_plain, strict=True))


def main(folder, arguments):
    """Train, and save every student's batches."""
    got, forward_backward = [], student.Student.forward_backward

    def recording(self, batch, *rest):
        seen = batch[self.normalise]
        labels = seen.labels if isinstance(seen.labels, tuple) else (seen.labels,)
        got.append([seen.images.clone(), *labels])
        forward_backward(self, batch, *rest)

    student.Student.forward_backward = recording
    status = pipeline.main(arguments)
    torch.save(got, folder / f"{os.environ['RANK']}.pt")
    return status


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), sys.argv[2:]))
