"""`gowide encode ffcv`: files written by FFCV's own DatasetWriter."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gowide_dist.data.beton import JPEG, RAW, Beton, read_foreign
from gowide_dist.data.encode import Options, encode
from gowide_dist.data.verify import verify_dataset
from gowide_dist.errors import DataError
from tests.command import gowide, refused


class _Photos:
    """Images of increasing size with labels, in the form that FFCV's writer takes."""

    def __init__(self, count: int, label_first: bool = False):
        self.count, self.label_first = count, label_first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple:
        y, x = np.mgrid[: 40 + index, : 30 + 2 * index]
        pixels = np.stack([3 * x % 256, 2 * y % 256, np.full_like(x, 7 * index % 256)], axis=2)
        sample = Image.fromarray(pixels.astype(np.uint8)), index % 3
        return sample[::-1] if self.label_first else sample


def _write(path: Path, count: int, write_mode: str, label_first: bool = False) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode=write_mode, compress_probability=0.5, jpeg_quality=90)
    fields = {"label": IntField(), "image": image} if label_first else {"image": image, "label": IntField()}
    photos = _Photos(count, label_first)
    DatasetWriter(str(path), fields, num_workers=2, page_size=1 << 21).from_indexed_dataset(photos)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stock")
    _write(root / "train_500_0.50_90.ffcv", 40, "proportion")
    _write(root / "val.beton", 10, "raw", label_first=True)
    return root


def test_every_image_is_copied_unchanged(stock: Path, tmp_path: Path):
    info = encode("ffcv", tmp_path / "out", stock)
    assert info.classes == ("0", "1", "2") and info.splits["train"].samples == 40
    beton = Beton(tmp_path / "out" / "train.beton")
    images, labels = read_foreign(stock / "train_500_0.50_90.ffcv")
    assert {*beton.modes.tolist()} == {JPEG, RAW}
    assert (beton.labels == labels).all() and (beton.labels == np.arange(40) % 3).all()
    for index, image in enumerate(images):
        assert beton.bytes[beton.offsets[index] :][: beton.sizes[index]].tobytes() == image.read().data
        assert (beton.heights[index], beton.widths[index]) == (40 + index, 30 + 2 * index)
    raw = Beton(tmp_path / "out" / "val.beton")
    pixels = raw.bytes[raw.offsets[3] :][: raw.sizes[3]].reshape(43, 36, 3)
    assert (pixels == np.asarray(_Photos(10)[3][0])).all()
    verify_dataset(tmp_path / "out")


def test_images_are_encoded_again_with_a_write_mode(stock: Path, tmp_path: Path):
    encode("ffcv", tmp_path / "out", stock, Options(jpg_share=1.0, max_side_px=32))
    beton = Beton(tmp_path / "out" / "train.beton")
    assert (beton.modes == JPEG).all() and max(beton.widths.max(), beton.heights.max()) == 32


def test_class_names_come_from_a_file(stock: Path, tmp_path: Path):
    root = tmp_path / "named"
    root.mkdir()
    for path in stock.iterdir():
        (root / path.name).symlink_to(path)
    (root / "classes.txt").write_text("ant\nbee\ncicada\n")
    result = gowide("encode", "ffcv", "--root", root, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert '"bee"' in (tmp_path / "out" / "dataset.json").read_text()
    (root / "classes.txt").write_text("ant\n")
    assert "labels 0 to 2, but 1 classes" in refused("encode", "ffcv", "--root", root, "--out", tmp_path / "other")
    for option in ("--max-side-px", "--quality"):
        line = refused("encode", "ffcv", "--root", root, "--out", tmp_path / "other", option, 32)
        assert "stored images stay as they are" in line


def test_damaged_files_are_refused(stock: Path, tmp_path: Path):
    whole = (stock / "val.beton").read_bytes()
    train = (stock / "train_500_0.50_90.ffcv").read_bytes()
    for name, content in {
        "empty": b"", "short": whole[:4000], "no table": whole[:-24], "another version": b"\x07" + whole[1:], "text": b"x" * 5000,
    }.items():  # fmt: skip
        root = tmp_path / name
        root.mkdir()
        (root / "train.beton").write_bytes(train)
        (root / "val.beton").write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            encode("ffcv", tmp_path / "out", root)
        assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_named(stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images, _ = read_foreign(stock / "train_500_0.50_90.ffcv")
    victim = next(index for index, image in enumerate(images) if image.mode == JPEG)
    content = bytearray((stock / "train_500_0.50_90.ffcv").read_bytes())
    content[images[victim].offset : images[victim].offset + 60] = bytes(60)
    root = tmp_path / "root"
    root.mkdir()
    (root / "train.ffcv").write_bytes(content)
    (root / "val.beton").write_bytes((stock / "val.beton").read_bytes())
    with pytest.raises(DataError, match="bad images: 1,"):
        encode("ffcv", tmp_path / "out", root)
    assert f"sample {victim}" in capsys.readouterr().err


def test_other_fields_are_refused(tmp_path: Path):
    from ffcv.fields import FloatField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="raw"), "target": FloatField()}
    DatasetWriter(str(tmp_path / "train.beton"), fields, num_workers=1).from_indexed_dataset(
        [(np.zeros((8, 8, 3), np.uint8), 0.5)]
    )
    with pytest.raises(DataError, match="other fields"):
        encode("ffcv", tmp_path / "out", tmp_path)
    with pytest.raises(DataError, match="no file train"):
        (tmp_path / "empty").mkdir()
        encode("ffcv", tmp_path / "out", tmp_path / "empty")
