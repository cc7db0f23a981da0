"""Every operation against torchvision's on the same draw, the draws themselves, and the exactness of the stream."""

from collections.abc import Iterator
from contextlib import closing
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from gowide_dist import load_recipe
from gowide_dist.data import augment, decode
from gowide_dist.data.augment import DRAWN, OPERATIONS, ColorJitter, Policy, RandomErasing
from gowide_dist.data.loader import augmentations_of
from gowide_dist.pipeline import open_data
from gowide_dist.recipe import Augment
from gowide_dist.timeline import Batching
from gowide_dist.world import join
from tests.data.conftest import photo
from tests.data.test_crops import loader_of, stream
from tests.data.test_loader import originals, same
from tests.fashion import chain, encode_part, write_job

KEY = np.uint64(7)
POLICIES = {  # and their reference
    Policy(wide=True, num_ops=1, magnitude=DRAWN): v2.TrivialAugmentWide(),
    Policy(wide=False, num_ops=1, magnitude=9): v2.RandAugment(),
    Policy(wide=False, num_ops=1, magnitude=30): v2.RandAugment(magnitude=30),
}
MEAN = (0.3, 0.5, 0.7)
ALL = tuple(
    augmentations_of(
        Augment(trivial_augment=True, color_jitter={"brightness": 0.4, "hue": 0.1}, erase={"probability": 0.5}), MEAN
    )
)


def images_of(num: int, side: int) -> np.ndarray:
    """Photographs, and one in four noise; of 28 px grey as RGB: uint8 [num, side, side, 3]."""
    rng = np.random.default_rng(side)
    images = np.stack([photo(rng, side, side) for _ in range(num)])
    images[::4] = rng.integers(0, 256, images[::4].shape, np.uint8)
    return images if side != 28 else np.repeat(images[..., :1], 3, axis=3)


def augmented(images: np.ndarray, augmentation: augment.Augmentation, key: np.uint64 = KEY) -> np.ndarray:
    images = images.copy()
    augment.augment(images, np.arange(len(images)), key, augmentation)
    return images


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def differences(image: np.ndarray, expected: torch.Tensor) -> np.ndarray:
    """Of each pixel the largest of its channels, in levels: [R, R]."""
    return abs(image.astype(int) - expected.permute(1, 2, 0).numpy().astype(int)).max(axis=2)


class Drawn(NamedTuple):
    """An operation as it was drawn, with the image before and after."""

    reference: v2.Transform
    name: str
    magnitude: float
    before: np.ndarray
    after: np.ndarray


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    def draw() -> Iterator[Drawn]:
        for side in (28, 64):
            before = images_of(1000, side)
            for policy, reference in POLICIES.items():
                after = augmented(before, policy)
                for index in range(len(before)):
                    sample_key = np.uint64(decode.draw(KEY, np.uint64(index)))
                    key = np.uint64(decode.draw(sample_key, np.uint64(augment._POLICY_DRAW)))
                    operation, magnitude = augment._choose(key, 0, policy, side)
                    yield Drawn(reference, OPERATIONS[operation], magnitude, before[index], after[index])

    return list(draw())


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvisions(drawn: list[Drawn], name: str):
    """Exactly, where levels are looked up. Sums are rounded in another order, to within one level. Points midway between
    two pixels may fall to either, by the processor that torchvision runs on: at most a row of an image does."""
    changed = 0
    for reference, _, magnitude, before, after in (each for each in drawn if each.name == name):
        expected = reference._apply_image_or_video_transform(
            tensor(before), name, magnitude, InterpolationMode.NEAREST, {torch.Tensor: None}
        )
        error = differences(after, expected)
        if name.startswith(("Shear", "Translate", "Rotate")):
            assert (error > 0).mean() < 0.04
        else:
            assert error.max() <= (name in ("Color", "Contrast", "Sharpness"))
        changed += differences(after, tensor(before)).any()
    assert (changed > 0) == (name != "Identity")


@pytest.mark.parametrize("name", OPERATIONS)
def test_magnitudes_are_torchvisions_and_operations_equally_likely(drawn: list[Drawn], name: str):
    for policy, reference in POLICIES.items():
        for side in (28, 64):
            magnitudes = [d.magnitude for d in drawn if (d.name, d.reference, len(d.before)) == (name, reference, side)]
            assert 40 < len(magnitudes) < 110  # of 1,000 / 14: mean 71, standard deviation 8
            of_index, signed = reference._AUGMENTATION_SPACE[name]
            table = of_index(augment.MAGNITUDES, side, side)
            if table is None:
                assert set(magnitudes) == {0}
                continue
            expected = table if policy.magnitude == DRAWN else table[policy.magnitude : policy.magnitude + 1]
            assert {abs(magnitude) for magnitude in magnitudes} <= set(expected.tolist())
            assert len({abs(magnitude) for magnitude in magnitudes}) > min(15, len(set(expected.tolist())) - 1)
            if signed:
                assert 0.25 < np.mean(np.array(magnitudes) > 0) < 0.75


def test_operations_follow_one_another():
    """The first of two draws is that of one operation, and more operations change more."""
    before = images_of(64, 64)
    once, twice = (augmented(before, Policy(wide=False, num_ops=num, magnitude=9)) for num in (1, 2))
    continued = [(once[i] == twice[i]).all() for i in range(64)]
    assert 0 < np.mean(continued) < 0.3  # the second was the identity, or changed nothing
    assert not (augmented(before, Policy(wide=False, num_ops=1, magnitude=9), np.uint64(8)) == once).all()


ADJUST = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)


def factors_of(index: int, jitter: ColorJitter) -> list[float]:
    sample_key = np.uint64(decode.draw(KEY, np.uint64(index)))
    key = np.uint64(decode.draw(sample_key, np.uint64(augment._JITTER_DRAW)))
    ranges = [(max(0.0, 1 - extent), 1 + extent) for extent in jitter[:3]] + [(-jitter.hue, jitter.hue)]
    return [decode.uniform(key, which, low, high) for which, (low, high) in enumerate(ranges)]


@pytest.mark.parametrize("side", [28, 64])
@pytest.mark.parametrize("which", range(4))
def test_a_jitter_is_torchvisions(which: int, side: int):
    jitter = ColorJitter(*(0.5 if i == which else 0.0 for i in range(4)))
    before = images_of(50, side)
    after = augmented(before, jitter)
    factors = [factors_of(index, jitter)[which] for index in range(50)]
    low, high = (-0.5, 0.5) if which == 3 else (0.5, 1.5)
    assert low <= min(factors) < low + 0.1 and high - 0.1 < max(factors) <= high
    for index, factor in enumerate(factors):
        assert differences(after[index], ADJUST[which](tensor(before[index]), factor)).max() <= 1


def test_jitters_come_in_a_drawn_order():
    """Rounding errors of one are multiplied by the next. Where two orders give nearly the same image, either counts."""
    jitter = ColorJitter(0.5, 0.5, 0.5, 0.2)
    before = images_of(120, 28 + 4)
    after, orders = augmented(before, jitter), set()
    for index in range(len(before)):
        factors, errors = factors_of(index, jitter), {}
        for order in permutations(range(4)):
            image = tensor(before[index])
            for which in order:
                image = ADJUST[which](image, factors[which])
            errors[order] = differences(after[index], image).mean()
        orders.add(best := min(errors, key=lambda order: errors[order]))
        assert errors[best] < 1
    assert len(orders) > 20  # of 24


def test_boxes_that_are_erased_are_torchvisions():
    """Kolmogorov-Smirnov tests of area, ratio and position, at a level of 0.1 %, and the probability."""
    num, side = 4000, 64
    erasing = RandomErasing(0.5, 0.02, 0.33, 0.3, 3.3, (1, 2, 3))
    erased = augmented(np.zeros((num, side, side, 3), np.uint8), erasing)
    masks = erased[..., 0] > 0
    assert (erased == masks[..., None] * np.array([1, 2, 3])).all()
    assert 0.47 < masks.any((1, 2)).mean() < 0.53
    masks = masks[masks.any((1, 2))]
    rows, columns = masks.any(2), masks.any(1)
    boxes = np.stack([rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)], axis=1)
    assert (masks.sum((1, 2)) == boxes[:, 2] * boxes[:, 3]).all()
    torch.manual_seed(0)
    transform = v2.RandomErasing(p=1)
    params = [transform.make_params([torch.empty(3, side, side)]) for _ in range(len(boxes))]
    expected = np.array([[each[name] for name in "ijhw"] for each in params])

    def features(boxes: np.ndarray) -> np.ndarray:
        top, left, height, width = boxes.T
        return np.stack([height * width, height / width, top / (side - height + 1), left / (side - width + 1)])

    for values, others in zip(features(boxes), features(expected), strict=True):
        grid = np.sort(np.concatenate([values, others]))
        cumulated = [np.searchsorted(np.sort(each), grid, side="right") / len(boxes) for each in (values, others)]
        assert abs(cumulated[0] - cumulated[1]).max() < 1.95 * np.sqrt(2 / len(boxes))


def test_what_is_erased_is_zero_after_normalisation():
    *_, erasing = ALL
    assert (abs(np.array(erasing.fill) / 255 - MEAN) <= 0.5 / 255).all()


@pytest.mark.parametrize("order", ["random", "quasi-random"])
def test_the_stream_is_exact(photo_set: Path, order: str):
    """The same for any number of threads, processes and restarts, and at every resolution."""
    options = {"augmentations": ALL, "order": order}
    once = stream(photo_set, **options)
    assert same(once, stream(photo_set, num_threads=2, **options))
    assert same(once[7:], stream(photo_set, start=7, **options))
    parts = [stream(photo_set, batching=Batching(24, 3, rank), **options) for rank in range(3)]
    for batch, *rest in zip(once, *parts, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in rest]))
    assert not torch.equal(once[0].images, stream(photo_set, epoch=1, **options)[0].images)
    loader = loader_of(photo_set, **options)
    grown = next(loader.batches(resolution=16)).images.clone()
    loader.close()
    assert torch.equal(grown, stream(photo_set, side=16, **options)[0].images)


def test_geometry_is_drawn_as_without(photo_set: Path):
    """An augmented image is the plain stream's, augmented: off changes no bit, and the draws are independent."""
    key = np.uint64(decode.order.epoch_key(0, 0, decode.order.AUGMENT_STREAM))
    for batch, plain in zip(stream(photo_set, augmentations=ALL), stream(photo_set), strict=True):
        images = plain.images.numpy().copy()
        for augmentation in ALL:
            augment.augment(images, plain.indices.numpy(), key, augmentation)
        assert (batch.images.numpy() == images).all()
        assert not torch.equal(batch.images, plain.images)


def test_what_a_recipe_leaves_out_is_not_done(photo_set: Path):
    assert tuple(augmentations_of(Augment(flip=True, crop={}), MEAN)) == ()
    assert [type(each) for each in ALL] == [Policy, ColorJitter, RandomErasing]
    rand = Augment(rand_augment={"num_ops": 3, "magnitude": 5})
    assert tuple(augmentations_of(rand, MEAN)) == (Policy(wide=False, num_ops=3, magnitude=5),)


def test_off_runs_and_compiles_nothing(photo_set: Path, monkeypatch: pytest.MonkeyPatch):
    def used(*_: object):
        raise RuntimeError("augmented")

    monkeypatch.setattr("gowide_dist.data.loader.augment", used)
    stream(photo_set)
    with pytest.raises(RuntimeError, match="augmented"):
        stream(photo_set, augmentations=ALL)


def test_training_images_alone_are_augmented(tmp_path: Path):
    recipe_values = chain(encode_part(tmp_path, 60, 60))
    recipe_values["data"]["augment"] = {"rand_augment": {}, "color_jitter": {"brightness": 0.4}, "erase": 0.5}
    recipe = load_recipe(write_job(tmp_path, recipe_values))
    with join() as world, open_data(recipe, world) as data, closing(data.train(0)) as train:
        for loader, name, changed in ((data.val, "val", 0), (train, "train", 55)):
            batch = next(loader.batches())
            plain = originals(tmp_path / "data", name)[batch.indices.numpy()]
            assert (batch.images.numpy() != plain).any((1, 2, 3)).sum() >= changed
            assert changed or (batch.images.numpy() == plain).all()
