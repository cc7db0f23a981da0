"""Images as people bring them: what is no image, what is damaged, and what would be stored wrongly without a word."""

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from gowide_dist.data import images as images_module
from gowide_dist.data.beton import JPEG, Beton
from gowide_dist.data.encode import Options, encode
from gowide_dist.data.images import Storage, read_rgb
from gowide_dist.errors import DataError
from tests.command import gowide, refused
from tests.data.conftest import photo

RAW = Options(workers=1)
KEEP = Options(jpg_share=None, workers=1)
PICTURE = photo(np.random.default_rng(1), 96, 128)


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def jpeg(**options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with two images each in train/, one in val/."""
    for split, count in (("train", 2), ("val", 1)):
        for name in ("cat", "dog"):
            for number in range(count):
                write(tmp_path / "images" / split / name / f"{number}.png", png(PICTURE[:, :, ::-1]))
    return tmp_path / "images"


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "train/cat/.ipynb_checkpoints/0-checkpoint.png", "train/cat/deep/.hidden/a.png", "train/.git/a.png",
        "val/dog/.ipynb_checkpoints/0-checkpoint.png", "train/__MACOSX/cat/._0.png", "train/cat/@eaDir/0.png",
        "train/cat/Thumbs.db", "train/cat/.DS_Store", "train/dog/desktop.ini", "train/dog/labels.csv",
        "val/dog/README.txt", "train/dog/list.json", "train/cat/0.xmp", "train/dog/movie.mp4", "train/dog/all.zip",
        "train/cat/._0.png", "train/readme.md", "val/labels.csv",
        "train/cat/0.png~", "train/cat/0.png:Zone.Identifier", "train/dog/train.beton", "train/dog/0.png.crdownload",
    ],
)  # fmt: skip
def test_what_is_no_image_is_left_out_and_said(root: Path, tmp_path: Path, name: str, capsys):
    write(root / name, png(PICTURE) if name.endswith(".png") else b"no image")
    info = encode("imagefolder", tmp_path / "out", root, RAW)
    assert info.classes == ("cat", "dog")
    assert {split: part.samples for split, part in info.splits.items()} == {"train": 4, "val": 2}
    notes = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ") and "left out 1 " in line
    ]
    told = [part for part in Path(name).parts[1:] if part in notes[0] or part.startswith(".")]
    assert len(notes) == 1 and told, notes


@pytest.mark.parametrize("name", ["a picture", "0.JPEG", "0.jfif", "1.webp", "2.dat"])
def test_what_may_be_an_image_is_one(root: Path, tmp_path: Path, name: str):
    write(root / "train" / "cat" / name, png(PICTURE))
    assert encode("imagefolder", tmp_path / "out", root, RAW).splits["train"].samples == 5


@pytest.mark.parametrize(
    ("link", "to"),
    [
        ("train/cat/up", ".."), ("train/cat/self", "."), ("train/cat/deep/root", "../../.."), ("val/dog/up", "../.."),
        ("train/cat/sibling", "../dog"), ("train/other", "cat"), ("train/cat/home", "/"),
    ],
)  # fmt: skip
def test_a_link_to_a_folder_that_counts_already_is_refused_by_name(root: Path, tmp_path: Path, link: str, to: str):
    (root / link).parent.mkdir(exist_ok=True)
    (root / link).symlink_to(to)
    with pytest.raises(DataError, match=r"would count (many times|twice); remove it") as error:
        encode("imagefolder", tmp_path / "out", root, RAW)
    assert str(root / link) in str(error.value)


def test_all_that_listing_tells_is_told_before_an_image_is_decoded(root: Path, tmp_path: Path, monkeypatch, capsys):
    write(root / "val" / "cat" / "empty.png", b"")
    (root / "train" / "dog" / "gone.png").symlink_to("nowhere")
    os.mkfifo(root / "train" / "dog" / "pipe.png")
    told: list[str] = []  # when an image is decoded

    def decode(content: bytes, storage: Storage):
        if content:
            told.append(capsys.readouterr().err)
        return read_rgb(content, storage)

    monkeypatch.setattr(images_module, "read_rgb", decode)
    with pytest.raises(DataError, match=r"bad images: 3,"):
        encode("imagefolder", tmp_path / "out", root, RAW)
    for text in ("empty.png: empty file", "gone.png: No such file", "pipe.png: not a regular file"):
        assert text in told[0]
    assert not (tmp_path / "out" / "dataset.json").exists()


WHOLE = jpeg()
PROGRESSIVE = jpeg(progressive=True)
SECOND_SCAN = [i for i in range(len(PROGRESSIVE)) if PROGRESSIVE[i : i + 2] == b"\xff\xda"][4]


@pytest.mark.parametrize(
    "content",
    [
        WHOLE[: len(WHOLE) // 2] + b"\xff\xd9",
        WHOLE[: len(WHOLE) // 2] + WHOLE,
        WHOLE[: len(WHOLE) // 2] + bytes(40) + WHOLE[len(WHOLE) // 2 + 40 :],
        WHOLE[:-400] + b"\xff\xd9",
        PROGRESSIVE[: len(PROGRESSIVE) // 2] + b"\xff\xd9",
        PROGRESSIVE[:SECOND_SCAN] + b"\xff\xd9",
        jpeg(restart_marker_blocks=4).replace(b"\xff\xd3", b"\xff\xd6", 1),
        WHOLE[:20],
        b"\xff\xd8\xff",
    ],
    ids=[
        "an end marker in the middle", "another image in the middle", "zeros", "the end is missing", "progressive", "scans are missing", "restart markers in disorder", "header", "start",
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [Options(jpg_share=1.0, workers=1), KEEP], ids=["jpg", "keep"])
def test_damage_that_decoders_only_warn_of_is_damage(root: Path, tmp_path: Path, content: bytes, options: Options):
    write(root / "train" / "cat" / "damaged.jpg", content)
    with pytest.raises(DataError, match=r"bad images: 1,.*damaged\.jpg \(..*\)"):
        encode("imagefolder", tmp_path / "out", root, options)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_damage_of_other_colours(mode: str):
    file = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(file, "JPEG")
    content = file.getvalue()
    assert read_rgb(content).pixels.shape == PICTURE.shape
    with pytest.raises(ValueError, match="premature end"):
        read_rgb(content[: len(content) // 2] + b"\xff\xd9")


@pytest.mark.parametrize(
    "content",
    [
        WHOLE, PROGRESSIVE, jpeg(restart_marker_blocks=4), jpeg(subsampling=0), jpeg(optimize=True), WHOLE + b"trailing",
        WHOLE.replace(b"JFIF\0\1\1", b"JFIF\0\0\0"), jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08garbage"),
    ],
)  # fmt: skip
def test_whole_jpegs_are_no_damage_and_have_the_pixels_of_pillow(content: bytes):
    assert (read_rgb(content).pixels == np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))).all()


def grey_alpha_16(values: np.ndarray) -> bytes:
    """A PNG of 16-bit grey with transparency, which neither Pillow nor OpenCV writes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape
    lines = np.stack([values, np.full_like(values, 65535)], -1).astype(">u2")
    raw = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def deep(kind: str, bits: int) -> bytes:
    """An image of `bits` bits in 16."""
    values = PICTURE.astype(np.uint16) << (bits - 8)
    if kind == "grey and alpha":
        return grey_alpha_16(values[..., 0])
    if kind == "grey":
        return png(values[..., 0])
    if kind == "TIFF":
        return cv2.imencode(".tif", values[..., 0])[1].tobytes()
    if kind == "colour TIFF":
        return cv2.imencode(".tif", values[..., ::-1])[1].tobytes()
    return png(
        np.dstack([values[..., ::-1], np.full_like(values[..., 0], 65535)]) if kind == "alpha" else values[..., ::-1]
    )


@pytest.mark.parametrize("kind", ["grey", "colour", "alpha", "grey and alpha", "TIFF", "colour TIFF"])
@pytest.mark.parametrize("bits", [10, 12])
def test_12_bits_in_16_are_told_with_the_option_that_mends_it(root: Path, tmp_path: Path, kind: str, bits: int):
    for path in root.rglob("*.png"):
        path.write_bytes(deep(kind, bits))
    with pytest.raises(
        DataError,
        match=rf"6 images of 16 bits a channel \(.*\.png is one\) have values up to [\d,]+: they use {bits} bits.*--bits {bits}",
    ):
        encode("imagefolder", tmp_path / "out", root, RAW)
    encode("imagefolder", tmp_path / "out", root, Options(bits=bits, workers=1))
    beton = Beton(tmp_path / "out" / "train.beton")
    grey = kind in ("grey", "grey and alpha", "TIFF")
    expected = np.repeat(PICTURE[..., :1], 3, 2) if grey else PICTURE
    assert (np.frombuffer(beton.image(0).data, np.uint8).reshape(PICTURE.shape) == expected).all()


def test_16_bits_that_are_used_or_meant_to_be_dark_are_stored(root: Path, tmp_path: Path):
    for path in root.rglob("*.png"):
        path.write_bytes(deep("grey", 12))
    encode("imagefolder", tmp_path / "dark", root, Options(bits=16, workers=1))
    write(root / "train" / "cat" / "bright.png", deep("colour", 16))
    encode("imagefolder", tmp_path / "out", root, RAW)


def test_12_bits_are_told_after_a_hundred_images(root: Path, tmp_path: Path):
    for number in range(300):
        write(root / "train" / "cat" / f"{number}.png", deep("grey", 12))
    with pytest.raises(DataError, match=r"^100 images of 16 bits"):
        encode("imagefolder", tmp_path / "out", root, RAW)


def ink(mode: str) -> bytes:
    """A black square on transparent ground."""
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[5:15, 5:15, 3] = 255
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.quantize(4, method=Image.Quantize.FASTOCTREE)
    elif mode == "LA":
        image = image.convert("LA")
    elif mode == "tRNS":
        grey = np.full((20, 20), 7, np.uint8)
        grey[5:15, 5:15] = 0
        image = Image.fromarray(grey)
    file = io.BytesIO()
    image.save(file, "PNG", **({"transparency": 7} if mode == "tRNS" else {}))
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
@pytest.mark.parametrize(("background", "colour"), [("white", (255, 255, 255)), ("#ff8000", (255, 128, 0))])
def test_transparent_images_are_composed_and_said(root: Path, tmp_path: Path, mode, background, colour, capsys):
    for path in root.rglob("*.png"):
        path.write_bytes(ink(mode))
    encode("imagefolder", tmp_path / "out", root, Options(background=background, workers=1))
    pixels = np.frombuffer(Beton(tmp_path / "out" / "train.beton").image(0).data, np.uint8).reshape(20, 20, 3)
    assert tuple(pixels[0, 0]) == colour and tuple(pixels[10, 10]) == (0, 0, 0)
    assert f"note: 6 images with transparent pixels, on {background}" in capsys.readouterr().err


def test_opaque_alpha_is_no_note(root: Path, tmp_path: Path, capsys):
    for path in root.rglob("*.png"):
        path.write_bytes(png(np.dstack([PICTURE, np.full_like(PICTURE[..., 0], 255)])))
    encode("imagefolder", tmp_path / "out", root, RAW)
    assert "transparent" not in capsys.readouterr().err


def test_bad_values_of_the_new_options(root: Path, tmp_path: Path):
    folders = ["--root", root, "--out", tmp_path / "out"]
    assert "--background puce-ish: should be a colour" in refused(
        "encode", "imagefolder", *folders, "--background", "puce-ish"
    )
    assert "Invalid value for '--bits'" in refused("encode", "imagefolder", *folders, "--bits", "8")
    line = refused("encode", "imagefolder", *folders, "--val-labels", tmp_path / "x.txt")
    assert "val: has class folders, and --val-labels is for one that has not" in line
    line = refused("encode", "cifar10", *folders, "--val-labels", tmp_path / "x.txt")
    assert line == "encode cifar10: has its labels with its images; leave out --val-labels"
    line = refused("encode", "fashion-mnist", "--out", tmp_path / "out", "--write-mode", "keep")
    assert "holds pixels, and no images that can be kept" in line


def test_scans_larger_than_pillow_allows(root: Path, tmp_path: Path, monkeypatch):
    """200 megapixels; the limit is what memory allows."""
    file = io.BytesIO()
    Image.new("L", (20_000, 10_000), 77).save(file, "PNG", compress_level=1)
    write(root / "train" / "cat" / "scan.png", file.getvalue())
    with pytest.raises(DataError, match=r"scan\.png \(20000x10000 px take 600,000,000 bytes, .*--max-side-px"):
        encode("imagefolder", tmp_path / "out", root, RAW)
    info = encode("imagefolder", tmp_path / "small", root, Options(max_side_px=512, workers=1))
    assert info.max_side_px == 512 and info.splits["train"].samples == 5
    monkeypatch.setattr(images_module, "available_memory_bytes", lambda: 1 << 30)
    with pytest.raises(DataError, match=r"scan\.png \(20,000 x 10,000 px take 2\.2 GiB to decode, 1\.0 are free"):
        encode("imagefolder", tmp_path / "none", root, Options(max_side_px=512, workers=1))


def test_counts_are_shown_and_very_unequal_ones_said(root: Path, tmp_path: Path, capsys):
    for number in range(30):
        write(root / "train" / "cat" / f"more {number}.png", png(PICTURE))
    (root / "val" / "dog" / "0.png").unlink()
    encode("imagefolder", tmp_path / "out", root, RAW)
    encode("imagefolder", tmp_path / "few", root, Options(subset=2, workers=1))
    shutil.rmtree(root / "train" / "dog")
    shutil.rmtree(root / "val" / "dog")
    encode("imagefolder", tmp_path / "one", root, RAW)
    lines = capsys.readouterr().err
    assert lines.count("note: cat is the only class: nothing can be learnt") == 1
    assert "train: 34 images in 2 classes: cat 32, dog 2\n" in lines
    assert "note: very unequal classes: cat has 32 images, dog 2; `class_weights: balanced`" in lines
    assert "note: val: no images of 1 classes: dog\n" in lines
    assert "note: train: no images of 1 classes: dog\n" in lines and lines.count("very unequal") == 1


def test_kept_jpegs_are_the_same_bytes(root: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    others = {
        "turned": jpeg(exif=exif), "grey": png(PICTURE[..., 0]), "png": png(PICTURE),
        "large": cv2.imencode(".jpg", cv2.resize(PICTURE, (300, 200)))[1].tobytes(),
        "filled": WHOLE[:2] + b"\xff\xff" + WHOLE[2:],  # a fill byte before a marker: the loader knows none
    }  # fmt: skip
    kept = {"whole": WHOLE, "progressive": PROGRESSIVE, "fine": jpeg(subsampling=0), "upright": jpeg(exif=Image.Exif()),
            "grey JPEG": cv2.imencode(".jpg", PICTURE[..., 0])[1].tobytes()}  # fmt: skip
    for path in root.rglob("*.png"):
        path.unlink()
    for split in ("train", "val"):
        for name, content in {**others, **kept}.items():
            write(root / split / "cat" / f"{name}.jpg", content)
            write(root / split / "dog" / f"{name}.jpg", content)
    encode("imagefolder", tmp_path / "out", root, Options(jpg_share=None, max_side_px=128, workers=1))
    beton = Beton(tmp_path / "out" / "val.beton")
    streams = [beton.image(index).data for index in range(len(beton))]
    assert {*kept.values()} <= {*streams}
    assert not {*others.values()} & {*streams}
    assert (beton.modes == JPEG).all() and max(beton.heights.max(), beton.widths.max()) == 128


def test_moments_of_kept_jpegs_are_those_of_their_pixels(root: Path, tmp_path: Path):
    for index, path in enumerate(sorted((root / "train").rglob("*.png"))):
        pixels = photo(np.random.default_rng(index), 40, 40)
        path.with_suffix(".jpg").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
        path.unlink()
    infos = [encode("imagefolder", tmp_path / name, root, o) for name, o in (("a", RAW), ("b", KEEP))]
    assert infos[0].mean == infos[1].mean and infos[0].std == infos[1].std


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "VAL"])
def test_other_names_of_val_are_understood(root: Path, tmp_path: Path, name: str):
    (root / "val").rename(root / name)
    (root / "train").rename(root / "Train")
    assert encode("imagefolder", tmp_path / "out", root, RAW).splits["val"].samples == 2


def test_a_test_folder_becomes_the_test_split_or_is_said(root: Path, tmp_path: Path, capsys):
    write(root / "test" / "cat" / "a.png", png(PICTURE))
    info = encode("imagefolder", tmp_path / "a", root, RAW)
    assert {name: split.samples for name, split in info.splits.items()} == {"train": 4, "val": 2, "test": 1}
    with pytest.raises(DataError, match="there are images for val and for test already"):
        encode("imagefolder", tmp_path / "b", root, Options(held_out=2, workers=1))
    (root / "test" / "cat" / "a.png").rename(root / "test" / "a.png")
    (root / "test" / "cat").rmdir()
    info = encode("imagefolder", tmp_path / "b", root, RAW)
    assert [*info.splits] == ["train", "val"]
    assert f"note: {root / 'test'}: 1 images without class folders: left out" in capsys.readouterr().err
    write(root / "valid" / "cat" / "a.png", png(PICTURE))
    with pytest.raises(DataError, match=r"both val/ and valid/; leave one"):
        encode("imagefolder", tmp_path / "c", root, RAW)


def test_the_folder_of_training_images_as_validation_is_said(root: Path, tmp_path: Path):
    for path in sorted((root / "val").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / "val").rmdir()
    (root / "val").symlink_to("train")
    result = gowide("encode", "imagefolder", "--root", root, "--out", tmp_path / "out", "--workers", 1)
    assert result.returncode == 0
    assert "is the folder of the training images: accuracies will be those of training" in result.stderr
