import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gowide_dist.data import decode
from gowide_dist.data.beton import Beton
from gowide_dist.data.loader import Batch, Loader
from gowide_dist.errors import DataError
from gowide_dist.timeline import Batching

BATCHING = Batching(48)
AUGMENT = decode.Shift(flip=True, translate=3)


def stream(
    folder: Path, epoch: int = 0, start: int = 0, *, batching: Batching = BATCHING, train: bool = True, **options
) -> list[Batch]:
    """The batches of an iteration, copied out of the buffers."""
    options = {"resolution": 28, "geometry": AUGMENT if train else decode.UNCHANGED, **options}
    loader = Loader(folder / ("train.beton" if train else "val.beton"), batching, train=train, **options)
    batches = [Batch(*(tensor.clone() for tensor in batch)) for batch in loader.batches(epoch, start)]
    assert len(batches) == loader.steps_per_epoch - start
    loader.close()
    return batches


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def originals(folder: Path, split: str = "train") -> np.ndarray:
    beton = Beton(folder / f"{split}.beton")
    return np.stack([beton.bytes[o : o + 28 * 28 * 3].reshape(28, 28, 3) for o in beton.offsets])


def variants(image: np.ndarray) -> np.ndarray:
    """Every outcome of a flip and a shift, by padding with black and cropping: [2 * 7 * 7, 28, 28, 3]."""
    padded = [np.pad(flipped, ((3, 3), (3, 3), (0, 0))) for flipped in (image, image[:, ::-1])]
    return np.stack([p[y : y + 28, x : x + 28] for p in padded for y in range(7) for x in range(7)])


def test_same_epoch_twice(small_set: Path):
    assert same(stream(small_set), stream(small_set))


def test_epochs_and_seeds_differ(small_set: Path):
    assert not same(stream(small_set), stream(small_set, epoch=1))
    assert not same(stream(small_set), stream(small_set, seed=1))


def test_a_sample_is_augmented_differently_in_every_epoch(small_set: Path):
    def by_sample(epoch: int) -> dict[int, torch.Tensor]:
        batches = stream(small_set, epoch)
        return {int(i): x for b in batches for i, x in zip(b.indices, b.images, strict=True)}

    first, second = by_sample(0), by_sample(1)
    in_both = first.keys() & second.keys()
    assert np.mean([torch.equal(first[i], second[i]) for i in in_both]) < 0.1


@pytest.mark.parametrize("start", [0, 1, 5, 11, 12])
def test_resume_is_the_tail(small_set: Path, start: int):
    assert same(stream(small_set, start=start), stream(small_set)[start:])


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_batches_of_all_processes_join_to_the_global_batch(small_set: Path, num_processes: int):
    streams = [stream(small_set, batching=Batching(48, num_processes, rank)) for rank in range(num_processes)]
    joined = [Batch(*(torch.cat(parts) for parts in zip(*step, strict=True))) for step in zip(*streams, strict=True)]
    assert same(joined, stream(small_set))


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_nothing(small_set: Path, num_threads: int):
    assert same(stream(small_set, num_threads=num_threads), stream(small_set))


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_validation_is_every_image_once_unchanged(small_set: Path, num_processes: int):
    batches = [
        batch
        for rank in range(num_processes)
        for batch in stream(small_set, batching=Batching(48, num_processes, rank), train=False)
    ]
    indices = torch.cat([batch.indices for batch in batches])
    assert indices.tolist() == list(range(203))
    assert (torch.cat([batch.images for batch in batches]).numpy() == originals(small_set, "val")).all()
    assert (torch.cat([batch.labels for batch in batches]).numpy() == Beton(small_set / "val.beton").labels).all()


def test_pixels_are_a_flip_and_a_shift_evenly_distributed(small_set: Path):
    images, labels = originals(small_set), Beton(small_set / "train.beton").labels
    counts = np.zeros(2 * 7 * 7)
    for epoch in range(6):
        for batch in stream(small_set, epoch):
            assert batch.labels.tolist() == labels[batch.indices].tolist()
            for image, index in zip(batch.images.numpy(), batch.indices, strict=True):
                matches = (variants(images[index]) == image).all(axis=(1, 2, 3))
                assert matches.sum() == 1
                counts += matches
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_squared < 160  # 97 degrees of freedom: mean 97, standard deviation 14


def test_without_augmentation_the_pixels_are_the_originals(small_set: Path):
    images = originals(small_set)
    for batch in stream(small_set, geometry=decode.UNCHANGED):
        assert (batch.images.numpy() == images[batch.indices]).all()


def test_buffers_are_not_overwritten_while_in_use(small_set: Path):
    loader = Loader(small_set / "train.beton", Batching(16), train=True, resolution=28, geometry=AUGMENT, num_threads=3)
    for batch in loader.batches():
        before = batch.images.clone()
        time.sleep(0.005)  # meanwhile the threads decode all batches ahead
        assert torch.equal(batch.images, before)
    loader.close()


def test_leaving_early_and_closing_end_the_threads(small_set: Path):
    others, torch_threads = {*threading.enumerate()}, torch.get_num_threads()  # others may end at any time
    loader = Loader(small_set / "train.beton", Batching(16), train=True, resolution=28, num_threads=2)
    own = {*threading.enumerate()} - others
    for epoch in range(20):
        batches = loader.batches(epoch)
        next(batches)
        batches.close()
    first, expected = next(loader.batches(3)), stream(small_set, 3, batching=Batching(16), geometry=decode.UNCHANGED)[0]
    assert torch.equal(first.images, expected.images)
    assert own and {*threading.enumerate()} - others == own
    loader.close()
    assert not {*threading.enumerate()} - others
    assert torch.get_num_threads() == torch_threads


def test_an_error_in_a_thread_reaches_the_consumer(small_set: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(decode, "fill", broken)
    with pytest.raises(RuntimeError, match="broken"):
        stream(small_set)


def test_an_error_of_a_gpu_in_a_thread_reaches_the_consumer(
    small_set: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """As where torch.cuda.set_device fails: within 300 s, without blaming the file system."""

    def broken(_: int):
        raise RuntimeError("CUDA error: out of memory")

    others, start = {*threading.enumerate()}, time.monotonic()
    loader = Loader(small_set / "train.beton", Batching(16), train=True, resolution=28, num_threads=2)
    loader._device = torch.device("cuda", 0)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: event)
    monkeypatch.setattr("gowide_dist.data.loader.copy_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", broken)
    with pytest.raises(RuntimeError, match="CUDA error: out of memory"):
        next(loader.batches())
    loader.close()
    assert time.monotonic() - start < 60
    assert not {*threading.enumerate()} - others
    assert capfd.readouterr().err == ""


def test_a_stall_is_an_error_that_names_the_file(small_set: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "fill", lambda *_: time.sleep(0.5))
    with pytest.raises(DataError, match=r"train\.beton: no data within 0\.1 s; is the file system hanging"):
        stream(small_set, timeout_s=0.1)


def test_a_stalled_thread_does_not_keep_the_process_alive(small_set: Path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from gowide_dist.data import decode, loader; from gowide_dist.timeline import Batching\n"
        "decode.fill = lambda *_: time.sleep(1000)\n"
        f"stream = loader.Loader(Path({str(small_set / 'val.beton')!r}), Batching(8), train=False, resolution=28,"
        "                       timeout_s=0.2)\n"
        "try: next(stream.batches())\n"
        "finally: stream.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "StallError" in done.stderr


def test_an_iteration_left_open_does_not_keep_the_process_alive(small_set: Path):
    code = (
        "from pathlib import Path\n"
        "from gowide_dist.data.loader import Loader; from gowide_dist.timeline import Batching\n"
        f"batches = Loader(Path({str(small_set / 'val.beton')!r}), Batching(8), train=False, resolution=28).batches()\n"
        "next(batches); raise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 3


def test_images_of_another_size_or_too_few_are_refused(small_set: Path):
    with pytest.raises(DataError, match="images of 28 to 28 px, but the resolution is 32"):
        stream(small_set, resolution=32)
    with pytest.raises(DataError, match="601 images, fewer than one batch of 1,024"):
        stream(small_set, batching=Batching(1024))
