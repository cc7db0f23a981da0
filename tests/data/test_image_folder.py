import os
import subprocess
import unicodedata
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from gowide_dist.data.beton import JPEG, Beton
from gowide_dist.data.encode import Options, encode, jpg_share_of, write_dataset
from gowide_dist.data.images import Storage, encode_sample, read_rgb
from gowide_dist.data.sources import ImageList, stratified
from gowide_dist.data.sources.image_folder import read_image_folder
from gowide_dist.data.workers import encode_images
from gowide_dist.errors import DataError
from tests.command import refused
from tests.data.conftest import photo, write_image_folder

RAW = Options(workers=1)


def folder_of(root: Path, *names: str) -> Path:
    """An image folder of files train/NAME, and one validation image of the first class."""
    rng = np.random.default_rng(0)
    for name in [*(f"train/{name}" for name in names), f"val/{Path(names[0]).parts[0]}/0.png"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(rng, 30, 40)).save(root / name, format="PNG")
    return root


def stored(beton: Beton) -> list[np.ndarray]:
    return [
        beton.bytes[o:][: h * w * 3].reshape(h, w, 3)
        for o, h, w in zip(beton.offsets, beton.heights, beton.widths, strict=True)
    ]


PICTURE = photo(np.random.default_rng(1), 30, 50)
GREY = PICTURE[:, :, 1]


def save_cmyk(path: Path) -> np.ndarray:
    Image.fromarray(PICTURE).convert("CMYK").save(path, format="JPEG", quality=100, subsampling=0)
    return PICTURE


def save_grey(path: Path) -> np.ndarray:
    Image.fromarray(GREY).save(path, format="JPEG", quality=100)
    return np.repeat(GREY[:, :, None], 3, 2)


def save_palette(path: Path) -> np.ndarray:
    image = Image.fromarray(PICTURE).quantize(16)
    image.save(path, format="PNG")
    return np.asarray(image.convert("RGB"))


def save_grey_16_bit(path: Path) -> np.ndarray:
    path.write_bytes(cv2.imencode(".png", GREY.astype(np.uint16) * 257)[1].tobytes())
    return np.repeat(GREY[:, :, None], 3, 2)


def save_rgb_16_bit(path: Path) -> np.ndarray:
    path.write_bytes(cv2.imencode(".png", PICTURE[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes())
    return PICTURE


def save_transparent(path: Path) -> np.ndarray:
    Image.fromarray(np.dstack([PICTURE, np.full_like(GREY, 51)])).save(path, format="PNG")
    return PICTURE // 5 + 204  # a fifth of it, on white


def save_rotated(path: Path) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer rotates it by 90 degrees clockwise
    Image.fromarray(PICTURE).save(path, format="JPEG", quality=100, subsampling=0, exif=exif)
    return np.rot90(PICTURE, -1)


def save_one_pixel_high(path: Path) -> np.ndarray:
    Image.fromarray(PICTURE[:1]).save(path, format="PNG")
    return PICTURE[:1]


def save_one_pixel(path: Path) -> np.ndarray:
    Image.fromarray(PICTURE[:1, :1]).save(path, format="PNG")
    return PICTURE[:1, :1]


@pytest.mark.parametrize(
    "save",
    [
        save_cmyk, save_grey, save_palette, save_grey_16_bit, save_rgb_16_bit, save_transparent, save_rotated,
        save_one_pixel_high, save_one_pixel,
    ],
)  # fmt: skip
@pytest.mark.parametrize("jpg_share", [0.0, 1.0])
def test_unusual_images_become_upright_rgb(tmp_path: Path, save, jpg_share: float):
    root = folder_of(tmp_path / "images", "one/b.png")
    expected = save(root / "train" / "one" / "a picture.JPEG").astype(int)
    encode("imagefolder", tmp_path / "out", root, Options(jpg_share=jpg_share, quality=100, workers=1))
    beton = Beton(tmp_path / "out" / "train.beton")
    index = [*zip(beton.heights, beton.widths, strict=True)].index(expected.shape[:2])
    stream = beton.bytes[beton.offsets[index] :][: beton.sizes[index]]
    pixels = read_rgb(stream.tobytes()).pixels if jpg_share else stored(beton)[index]
    assert abs(pixels - expected).mean() < (6 if jpg_share else 3)  # JPEG halves the resolution of colours


@pytest.fixture
def bad_root(tmp_path: Path) -> Path:
    root = folder_of(tmp_path / "images", "one/a.png", "one/b.png", "two/c.png")
    whole = (root / "train" / "one" / "a.png").read_bytes()
    jpeg = encode_sample(PICTURE, 0, 0, Storage(jpg_share=1.0)).image.data
    (root / "train" / "one" / "empty.jpg").write_bytes(b"")
    (root / "train" / "one" / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (root / "train" / "two" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "two" / "text.jpg").write_text("not an image")
    (root / "train" / "two" / "gone.jpg").symlink_to("nowhere")
    (root / "val" / "one" / "bad in val.jpg").write_bytes(b"\xff\xd8\xff")
    return root


BAD = {"empty.jpg", "cut.jpg", "cut.png", "text.jpg", "gone.jpg", "bad in val.jpg"}


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_stop_the_encode_and_are_listed(
    bad_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
):
    (bad_root / "train" / "one" / "two\nlines.jpg").write_bytes(b"no image")
    names = BAD | {"two\\nlines.jpg"}
    with pytest.raises(DataError, match=rf"bad images: {len(names)},.*--skip-bad") as error:
        encode("imagefolder", tmp_path / "out", bad_root, Options(workers=workers))
    assert "\n" not in str(error.value)
    lines = capsys.readouterr().err.splitlines()
    listed = [line for line in lines if line.startswith("bad image ")]
    assert {Path(line.removeprefix("bad image ").split(":")[0]).name for line in listed} == names
    known_by_listing = next(index for index, line in enumerate(lines) if line.startswith("bad images end the encode"))
    told_early = "".join(lines[:known_by_listing])
    assert "empty.jpg" in told_early and "gone.jpg" in told_early and "text.jpg" not in told_early


def test_bad_images_can_be_skipped(bad_root: Path, tmp_path: Path):
    info = encode("imagefolder", tmp_path / "out", bad_root, Options(skip_bad=True, workers=1))
    assert (info.splits["train"].samples, info.splits["val"].samples) == (3, 1)
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert {Path(line.split("\t")[0]).name for line in lines} == BAD
    assert all(line.split("\t")[1] for line in lines)


def test_a_file_that_cannot_be_read_is_a_bad_image(tmp_path: Path):
    root = folder_of(tmp_path / "images", "one/a.png")
    (root / "train" / "one" / "unreadable.png").symlink_to("/proc/self/mem")  # an I/O error for root too
    with pytest.raises(DataError, match=r"unreadable\.png \(Input/output error\)"):
        encode("imagefolder", tmp_path / "out", root, Options(jpg_share=1.0, workers=1))


def test_names_with_spaces_and_unicode_and_links(tmp_path: Path):
    root = folder_of(tmp_path / "images", "weißer Hai 鲨/ein Bild.png", "zebra/deeper/b.png")
    (root / "train" / "zebra" / "link.png").symlink_to(root / "train" / "weißer Hai 鲨" / "ein Bild.png")
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(PICTURE).save(tmp_path / "elsewhere" / "c.png")
    (root / "train" / "linked class").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "zebra" / ".hidden").write_text("")
    info = encode("imagefolder", tmp_path / "out", root, RAW)
    assert info.classes == ("linked class", "weißer Hai 鲨", "zebra")
    assert sorted(Beton(tmp_path / "out" / "train.beton").labels) == [0, 1, 2, 2]


def test_a_folder_that_a_mac_has_spelt(tmp_path: Path):
    """Its accents are letters of their own: the class is the same, and cannot be there twice."""
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folder_of(tmp_path, f"{nfc}/0.png", "dog/0.png")
    (tmp_path / "val" / nfc).rename(tmp_path / "val" / nfd)
    dataset = read_image_folder(tmp_path)
    assert dataset.classes == (nfc, "dog")
    assert dataset.splits["val"].labels.tolist() == [0]
    (tmp_path / "train" / nfd).mkdir()
    with pytest.raises(DataError, match="two folders are called café, in different Unicode forms"):
        read_image_folder(tmp_path)


def test_one_class(tmp_path: Path):
    info = encode("imagefolder", tmp_path / "out", folder_of(tmp_path / "images", "only/a.png"), RAW)
    assert info.classes == ("only",)


def test_70_000_classes(tmp_path: Path):
    """The folders are real; the files are replaced by pixels, because opening each would take a minute."""
    root = folder_of(tmp_path / "images", "c00000/0.png")
    for label in range(1, 70_000):
        folder = root / "train" / f"c{label:05}"
        folder.mkdir()
        (folder / "0.png").touch()
    dataset = read_image_folder(root)
    pixels = {name: np.zeros((len(images), 2, 2, 3), np.uint8) for name, images in dataset.splits.items()}
    splits = {name: ImageList(pixels[name], images.labels) for name, images in dataset.splits.items()}
    info = write_dataset(tmp_path / "out", replace(dataset, splits=splits), {}, RAW)
    assert len(info.classes) == info.splits["train"].samples == 70_000
    assert sorted(Beton(tmp_path / "out" / "train.beton").labels) == list(range(70_000))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("mkdir train/three", "1 class folders without images .three."),
        ("mv val/one val/One", "class folder One is none of training's, did you mean 'one'"),
        ("rm -r train", "train: not found .*--held-out N"),
        ("rm -r train/*", "train: no class folders"),
        ("rm -r val", "no validation images; --held-out takes"),
        ("mkdir val/other", "class folder other is none of training's, valid: one, two"),
        ("rm val/one/*", "val: no images"),
    ],
)
def test_missing_empty_and_unmatched_folders(tmp_path: Path, damage: str, message: str):
    root = folder_of(tmp_path / "images", "one/a.png", "two/b.png")
    subprocess.run(damage, shell=True, cwd=root, check=True)
    with pytest.raises(DataError, match=message):
        encode("imagefolder", tmp_path / "out", root, RAW)


def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path):
    write_image_folder(tmp_path / "images", 150, 5)
    options = [Options(jpg_share=0.5, workers=workers) for workers in (1, 2)]
    one, two = (encode("imagefolder", tmp_path / str(o.workers), tmp_path / "images", o) for o in options)
    assert one == two
    modes = Beton(tmp_path / "1" / "train.beton").modes
    assert 45 < (modes == JPEG).sum() < 105


class Bomb:
    def __reduce__(self):
        return os._exit, (1,)


def test_a_dead_worker_is_an_error():
    items = [Bomb() for _ in range(100)]
    with pytest.raises(DataError, match=r"worker process .* died"):
        list(encode_images(ImageList(items, np.zeros(100, np.int64)), np.arange(100), Storage(), 1.0, workers=2))


def test_max_side_and_statistics(tmp_path: Path):
    write_image_folder(tmp_path / "images", 30, 5)
    info = encode("imagefolder", tmp_path / "out", tmp_path / "images", Options(max_side_px=64, workers=1))
    beton = Beton(tmp_path / "out" / "train.beton")
    assert info.max_side_px == 64 and info.fixed_side_px is None
    assert np.maximum(beton.heights, beton.widths).max() == 64
    pixels = stored(beton)
    mean = np.mean([(image / 255).mean((0, 1)) for image in pixels], 0)
    mean_square = np.mean([((image / 255) ** 2).mean((0, 1)) for image in pixels], 0)
    assert info.mean == pytest.approx(mean, abs=1e-5)
    assert info.std == pytest.approx(np.sqrt(mean_square - mean**2), abs=1e-5)


def test_subset_and_held_out_are_stratified_and_disjoint(tmp_path: Path):
    write_image_folder(tmp_path / "images", 40, 8)
    options = Options(held_out=8, subset=20, workers=1)
    info = encode("imagefolder", tmp_path / "out", tmp_path / "images", options)
    assert {name: split.samples for name, split in info.splits.items()} == {"train": 20, "val": 8, "test": 8}
    train, val = (Beton(tmp_path / "out" / f"{name}.beton") for name in ("train", "val"))
    assert np.bincount(train.labels).tolist() == [5, 5, 5, 5]
    assert np.bincount(val.labels).tolist() == [2, 2, 2, 2]
    assert not {image.tobytes() for image in stored(train)} & {image.tobytes() for image in stored(val)}


def test_stratified_keeps_the_proportions_of_uneven_classes():
    labels = np.repeat([0, 1, 2], [1000, 100, 10])
    chosen = stratified(labels, 222)
    assert np.bincount(labels[chosen]).tolist() == [200, 20, 2]


@pytest.mark.parametrize("option", ["quality=0", "quality=101", "max-side-px=0", "subset=0", "held-out=-1"])
def test_bad_options(tmp_path: Path, option: str):
    line = refused("encode", "imagefolder", "--root", tmp_path, "--out", tmp_path / "out", f"--{option}")
    assert f"Invalid value for '--{option.split('=')[0]}'" in line


@pytest.mark.parametrize("write_mode", ["1.5", "-0.1", "nan", "bmp"])
def test_bad_write_modes(write_mode: str):
    with pytest.raises(DataError, match=f"^--write-mode {write_mode}: should be raw, jpg or a fraction from 0 to 1"):
        jpg_share_of("imagefolder", write_mode)


@pytest.mark.parametrize("options", [{"subset": 4}, {"held_out": 3}])
def test_subset_or_held_out_of_more_images_than_exist(tmp_path: Path, options: dict[str, int]):
    root = folder_of(tmp_path / "images", "one/a.png", "one/b.png", "one/c.png")
    with pytest.raises(DataError, match="there are 3 training images"):
        encode("imagefolder", tmp_path / "out", root, Options(workers=1, **options))


def test_an_image_larger_than_a_page_says_what_to_do(tmp_path: Path):
    root = folder_of(tmp_path / "images", "one/a.png")
    Image.fromarray(np.zeros((2000, 2000, 3), np.uint8)).save(root / "train" / "one" / "big.png")
    with pytest.raises(DataError, match="--write-mode jpg or a smaller --max-side-px"):
        encode("imagefolder", tmp_path / "out", root, RAW)
