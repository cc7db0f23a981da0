"""Images of varying sizes, half of them JPEG: the exactness of the stream, and the crops against torchvision's."""

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from gowide_dist.data import decode, jpeg
from gowide_dist.data.beton import JPEG, Beton
from gowide_dist.data.encode import Options, encode
from gowide_dist.data.images import read_rgb
from gowide_dist.data.loader import Batch, Loader
from gowide_dist.data.order import quasi_random_order, random_order
from gowide_dist.errors import DataError
from gowide_dist.timeline import Batching
from tests.data.conftest import photo
from tests.data.test_loader import same

SIDE = 32
BATCHING = Batching(24)
CROP = decode.RandomResizedCrop(True, 0.08, 1.0, 3 / 4, 4 / 3)
LARGE_CROP = CROP._replace(flip=False, min_scale=0.3)


def loader_of(folder: Path, batching: Batching = BATCHING, **options) -> Loader:
    return Loader(folder / "train.beton", batching, **{"train": True, "resolution": SIDE, "geometry": CROP, **options})


def stream(
    folder: Path, epoch: int = 0, start: int = 0, side: int | None = None, *, batching: Batching = BATCHING, **options
) -> list[Batch]:
    """The batches of an iteration, copied out of the buffers; `side`: of this epoch's images, in pixels."""
    loader = loader_of(folder, batching, **options)
    batches = [Batch(*(tensor.clone() for tensor in batch)) for batch in loader.batches(epoch, start, side)]
    loader.close()
    return batches


def pixels_of(beton: Beton, index: int) -> torch.Tensor:
    """Image `index`, decoded by Pillow: [3, H, W]."""
    stored = beton.bytes[beton.offsets[index] :][: beton.sizes[index]]
    shape = beton.heights[index], beton.widths[index], 3
    image = read_rgb(stored.tobytes()).pixels if beton.modes[index] == JPEG else stored.reshape(shape)
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("order", ["random", "quasi-random"])
class TestExactness:
    """The stream is the same for any number of processes, threads and restarts."""

    def test_same_epoch_twice_and_others_differ(self, photo_set: Path, order: str):
        once = stream(photo_set, order=order)
        assert same(once, stream(photo_set, order=order))
        assert not same(once, stream(photo_set, epoch=1, order=order))
        assert not same(once, stream(photo_set, seed=1, order=order))

    def test_resume_at_20_random_steps(self, photo_set: Path, order: str):
        whole = stream(photo_set, batching=Batching(4), order=order)
        for start in np.random.default_rng(0).integers(0, len(whole), 20):
            assert same(stream(photo_set, start=int(start), batching=Batching(4), order=order), whole[start:])

    @pytest.mark.parametrize("num_processes", [2, 3, 4])
    def test_batches_of_all_processes_join_to_the_global_batch(self, photo_set: Path, order: str, num_processes: int):
        parts = [Batching(24, num_processes, rank) for rank in range(num_processes)]
        streams = [stream(photo_set, batching=part, order=order) for part in parts]
        steps = zip(*streams, strict=True)
        joined = [Batch(*(torch.cat(tensors) for tensors in zip(*step, strict=True))) for step in steps]
        assert same(joined, stream(photo_set, order=order))

    def test_threads_change_nothing(self, photo_set: Path, order: str):
        assert same(stream(photo_set, num_threads=2, order=order), stream(photo_set, order=order))


def test_resolution_changes_by_epoch_without_compiling(photo_set: Path):
    loader = loader_of(photo_set, geometry=LARGE_CROP, resolution=48)
    list(loader.batches())
    compiled = len(decode.decode_random_crops.signatures)
    for epoch, side in enumerate((16, 24, 48)):
        batches = loader.batches(epoch, resolution=side)
        expected = stream(photo_set, epoch, side=side, geometry=LARGE_CROP, resolution=48)
        assert torch.equal(next(batches).images, expected[0].images)
        assert expected[0].images.shape == (24, side, side, 3)
        batches.close()
    assert len(decode.decode_random_crops.signatures) == compiled
    loader.close()


def test_pixels_are_torchvisions_of_the_same_box(photo_set: Path):
    """Within one level for a raw image: torchvision rounds between rows and columns. For a JPEG, two decoders differ
    (fast or exact inverse DCT, chroma upsampling) by less than two levels on average."""
    beton = Beton(photo_set / "train.beton")
    images = np.empty((len(beton), SIDE, SIDE, 3), np.uint8)
    key = np.uint64(7)
    arrays = decode.BetonArrays.of(beton)
    decode.fill(arrays, np.arange(len(beton)), key, CROP, images, decode.Scratch.of(arrays))
    num_flipped = 0
    for index in range(len(beton)):
        sample_key = np.uint64(decode.draw(key, np.uint64(index)))
        top, left, height, width = decode._random_box(sample_key, beton.heights[index], beton.widths[index], CROP)
        crop = pixels_of(beton, index)[:, top : top + height, left : left + width]
        expected = functional.resize(crop, [SIDE, SIDE], antialias=True).permute(1, 2, 0).numpy().astype(int)
        differences = [abs(images[index] - expected), abs(images[index] - expected[:, ::-1])]
        flipped = int(differences[1].mean() < differences[0].mean())
        num_flipped += flipped
        if beton.modes[index] == JPEG:
            assert differences[flipped].mean() < 2
        else:
            assert differences[flipped].max() <= 1
    assert 90 < num_flipped < 150  # of 241


def test_boxes_are_distributed_as_torchvisions():
    """Two-sample Kolmogorov-Smirnov tests of area, ratio and position, at a level of 0.1 %."""
    num, height, width = 4000, 300, 400
    keys = np.arange(num, dtype=np.uint64)
    boxes = np.array(
        [decode._random_box(np.uint64(decode.draw(np.uint64(3), key)), height, width, CROP) for key in keys]
    )
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(SIDE)
    image = torch.empty(3, height, width)
    drawn = [transform.make_params([image]) for _ in range(num)]
    expected = np.array([[box[name] for name in ("top", "left", "height", "width")] for box in drawn])

    def features(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, h, w = boxes.T.astype(float)
        rng = np.random.default_rng(0)  # breaks ties: the positions are few integers
        return {
            "area": h * w,
            "ratio": w / h,
            "top": top / (height - h + 1) + rng.uniform(0, 1e-3, len(top)),
            "left": left / (width - w + 1) + rng.uniform(0, 1e-3, len(left)),
        }

    for name, values in features(boxes).items():
        expected_values = features(expected)[name]
        grid = np.sort(np.concatenate([values, expected_values]))
        cumulated = [np.searchsorted(np.sort(x), grid, side="right") / num for x in (values, expected_values)]
        assert abs(cumulated[0] - cumulated[1]).max() < 1.95 * np.sqrt(2 / num), name


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (1, 300)])
def test_boxes_of_extreme_images_lie_inside(height: int, width: int):
    for key in range(200):
        top, left, h, w = decode._random_box(np.uint64(key * 12345), height, width, CROP)
        assert h > 0 and w > 0 and 0 <= top <= height - h and 0 <= left <= width - w


@pytest.mark.parametrize(
    "options",
    [
        {}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1, "progressive": True}, {"restart_marker_rows": 1},
        {"restart_marker_blocks": 3, "progressive": True}, {"comment": b"a" * 3000, "dpi": (300, 300)}, {"keep_rgb": True},
        {"mode": "L"}, {"mode": "L", "progressive": True},
    ],
    ids=str,
)  # fmt: skip
def test_partial_decoding_gives_the_top_rows_of_the_whole(options: dict):
    """Of every kind of JPEG that may be kept as it is."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(np.asarray(rng.integers(0, 256, (133, 150, 3), np.uint8)))
    file = io.BytesIO()
    noise.convert(options.get("mode")).save(file, "JPEG", **{"quality": 90, **options})
    assert jpeg.read_frame(file.getvalue()).plain
    data = np.frombuffer(file.getvalue(), np.uint8)
    column = np.zeros(1, np.int64)
    arrays = decode.BetonArrays(data, column, column + len(data), np.zeros(1, np.uint8), column + 133, column + 150)
    scratch = decode.Scratch.of(arrays)
    decode._decode_jpeg(arrays, 0, 133, scratch)
    whole = scratch.pixels.reshape(133, 150, 3).copy()
    for num_rows in range(1, 134):
        scratch.pixels.setflags(write=True)
        scratch.pixels[:] = 0
        scratch.pixels.setflags(write=False)
        decode._decode_jpeg(arrays, 0, num_rows, scratch)
        assert (scratch.pixels.reshape(133, 150, 3)[:num_rows] == whole[:num_rows]).all()
    assert abs(whole.astype(int) - read_rgb(data.tobytes()).pixels).mean() < 3


@pytest.mark.parametrize("ratio", [0.875, 1.0])
def test_validation_is_torchvisions_resize_and_center_crop(photo_set: Path, ratio: float):
    """With the tolerances of test_pixels_are_torchvisions_of_the_same_box."""
    beton = Beton(photo_set / "val.beton")
    loader = Loader(
        photo_set / "val.beton", Batching(16), train=False, resolution=SIDE, geometry=decode.CenterCrop(ratio)
    )
    num_images = 0
    for batch in loader.batches():
        for image, index in zip(batch.images.numpy(), batch.indices.tolist(), strict=True):
            resized = functional.resize(pixels_of(beton, index), round(SIDE / ratio), antialias=True)
            expected = functional.center_crop(resized, [SIDE, SIDE]).permute(1, 2, 0).numpy()
            difference = abs(image - expected.astype(int))
            assert difference.mean() < 2 if beton.modes[index] == JPEG else difference.max() <= 1
            num_images += 1
    loader.close()
    assert num_images == len(beton)


def test_jpegs_of_fixed_size_can_be_shifted(tmp_path: Path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / "images" / split / "one").mkdir(parents=True)
        for index in range(4):
            Image.fromarray(photo(rng, SIDE, SIDE)).save(tmp_path / "images" / split / "one" / f"{index}.png")
    encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(jpg_share=1.0, quality=95, workers=1))
    beton = Beton(tmp_path / "out" / "train.beton")
    for batch in stream(tmp_path / "out", batching=Batching(4), geometry=decode.UNCHANGED):
        expected = torch.stack([pixels_of(beton, index).permute(1, 2, 0) for index in batch.indices])
        assert (batch.images.int() - expected.int()).abs().float().mean() < 2


def test_varying_sizes_need_a_crop(photo_set: Path):
    with pytest.raises(DataError, match=r"data\.augment\.crop, data\.center_crop"):
        stream(photo_set, geometry=decode.UNCHANGED)


def pages_per_batch(order: np.ndarray, pages: np.ndarray) -> float:
    """Distinct pages of a batch of 100, on average."""
    return np.mean([len(set(batch)) for batch in pages[order].reshape(-1, 100)])


def neighbour_correlation(order: np.ndarray) -> float:
    """Correlation of each sample's number with the next one's: 0 for a random order, 1 for the file's."""
    return np.corrcoef(order[:-1], order[1:])[0, 1]


def test_quasi_random_order_is_local_and_random():
    pages = np.repeat(np.arange(200), 50)
    order, needed = quasi_random_order(pages, window_pages=10, seed=0, epoch=0)
    assert sorted(order) == list(range(10_000)) and sorted(needed) == list(range(200))
    windows = pages[order].reshape(20, 500)
    assert all(set(window) == set(needed[10 * i : 10 * i + 10]) for i, window in enumerate(windows))
    shuffled = random_order(10_000, 0, 0)
    assert pages_per_batch(order, pages) <= 10 < 60 < pages_per_batch(shuffled, pages)
    assert abs(neighbour_correlation(shuffled)) < 0.05
    assert all(abs(neighbour_correlation(part)) < 0.2 for part in order.reshape(20, 500))
    assert neighbour_correlation(np.arange(10_000)) > 0.99


def test_pages_are_read_ahead_before_they_are_needed(photo_set: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gowide_dist.data.beton.Beton.read_ahead", lambda _, page: read.append(page))
    read: list[int] = []
    loader = loader_of(photo_set, order="quasi-random", window_pages=1)
    loader._beton.pages = np.arange(241) // 24  # as if the file were large
    for step, batch in enumerate(loader.batches()):
        assert set(loader._beton.pages[batch.indices]) <= set(read)
        if step == 0:
            assert len(read) < 11
    assert len(read) == len(set(read))
    loader.close()


def _rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def test_nothing_grows_over_50_epochs(photo_set: Path):
    loader = loader_of(photo_set, num_threads=2)
    growth = []
    for epoch in range(50):
        batches = loader.batches(epoch)
        for _ in range(3 if epoch % 2 else loader.steps_per_epoch):
            next(batches)
        batches.close()
        growth.append((threading.active_count(), _rss_mib()))
    loader.close()
    assert len({threads for threads, _ in growth}) == 1
    assert growth[-1][1] - growth[5][1] < 4


def test_labels_and_memory_are_checked_before_training(photo_set: Path, monkeypatch: pytest.MonkeyPatch):
    loader = loader_of(photo_set)
    loader.preflight(num_classes=4)
    with pytest.raises(DataError, match="labels 0 to 3, but there are 3 classes"):
        loader.preflight(num_classes=3)
    loader.close()
    monkeypatch.setattr("gowide_dist.data.loader.available_memory_bytes", lambda: 1000)
    with pytest.raises(DataError, match="take a smaller batch"):
        loader_of(photo_set)
