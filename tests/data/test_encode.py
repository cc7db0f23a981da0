import gzip
from pathlib import Path

import numpy as np
import pytest

from gowide_dist.data.beton import Beton
from gowide_dist.data.encode import Options, encode
from gowide_dist.data.idx import read_idx
from gowide_dist.data.info import check_split, read_dataset_info
from gowide_dist.errors import DataError
from tests.idx import write_fashion_mnist, write_idx


@pytest.fixture
def idx_root(tmp_path: Path) -> Path:
    write_fashion_mnist(tmp_path / "idx", 40, 20)
    return tmp_path / "idx"


def test_pixels_labels_and_statistics(idx_root: Path, tmp_path: Path):
    info = encode("fashion-mnist", tmp_path / "out", idx_root)
    images = read_idx(idx_root / "train-images-idx3-ubyte", 3)
    beton = Beton(tmp_path / "out" / "train.beton")
    stored = [beton.bytes[o : o + 28 * 28 * 3].reshape(28, 28, 3) for o in beton.offsets]
    assert (np.stack(stored) == images[..., None]).all()
    assert (beton.labels == read_idx(idx_root / "train-labels-idx1-ubyte", 1)).all()
    assert info.mean == pytest.approx([images.mean() / 255] * 3, abs=1e-5)
    assert info.std == pytest.approx([images.std() / 255] * 3, abs=1e-5)
    assert info.classes[0] == "T-shirt/top" and info.classes[9] == "Ankle boot"
    assert str(idx_root) in info.source


def test_stock_ffcv_reads_the_file(small_set: Path):
    from ffcv.loader import Loader, OrderOption

    beton = Beton(small_set / "val.beton")
    for images, labels in Loader(str(small_set / "val.beton"), 203, num_workers=1, order=OrderOption.SEQUENTIAL):
        assert (labels[:, 0].numpy() == beton.labels).all()
        assert (images[7].numpy().ravel() == beton.bytes[beton.offsets[7] :][: 28 * 28 * 3]).all()


def test_the_same_input_gives_the_same_bytes(idx_root: Path, tmp_path: Path):
    first = encode("fashion-mnist", tmp_path / "a", idx_root)
    second = encode("fashion-mnist", tmp_path / "b", idx_root)
    assert first == second


def test_second_encode_does_nothing(idx_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = encode("fashion-mnist", tmp_path / "out", idx_root)
    written = (tmp_path / "out" / "train.beton").stat().st_mtime_ns
    assert encode("fashion-mnist", tmp_path / "out", idx_root) == first
    assert (tmp_path / "out" / "train.beton").stat().st_mtime_ns == written
    assert "nothing to do. If images have changed since, remove it" in capsys.readouterr().err


def test_damaged_dataset_is_encoded_again(idx_root: Path, tmp_path: Path):
    encode("fashion-mnist", tmp_path / "out", idx_root)
    (tmp_path / "out" / "val.beton").write_bytes(b"short")
    encode("fashion-mnist", tmp_path / "out", idx_root)
    check_split(tmp_path / "out" / "val.beton")


def test_dataset_with_damaged_json_is_encoded_again(idx_root: Path, tmp_path: Path):
    first = encode("fashion-mnist", tmp_path / "out", idx_root)
    (tmp_path / "out" / "dataset.json").write_text("{")
    assert encode("fashion-mnist", tmp_path / "out", idx_root) == first
    assert read_dataset_info(tmp_path / "out" / "train.beton") == first


def test_another_dataset_is_not_overwritten(idx_root: Path, tmp_path: Path):
    encode("fashion-mnist", tmp_path / "out", idx_root)
    write_fashion_mnist(tmp_path / "other", 40, 20)
    with pytest.raises(DataError, match=r"holds another dataset \(root \S+, not \S+/other\)"):
        encode("fashion-mnist", tmp_path / "out", tmp_path / "other")
    with pytest.raises(DataError, match=r"holds another dataset \(jpg_share 0\.0, not 1\.0, subset None, not 5\)"):
        encode("fashion-mnist", tmp_path / "out", idx_root, Options(jpg_share=1.0, subset=5))


@pytest.mark.parametrize("inside", ["train/out", "val", "Valid/out", "train/class 0"])
def test_a_folder_among_the_images_is_refused(tmp_path: Path, inside: str):
    """It would be a class for the next encode."""
    with pytest.raises(DataError, match=r"is among the images of \S+; choose another --out"):
        encode("imagefolder", tmp_path / inside, tmp_path)
    assert not any(tmp_path.iterdir())


def test_options_that_change_nothing_are_told(idx_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    encode("fashion-mnist", tmp_path / "out", idx_root, Options(jpg_share=0.0, quality=50, bits=12))
    told = capsys.readouterr().err
    assert "--quality 50: changes nothing" in told
    assert "--bits 12: changes nothing" in told


def test_missing_root_says_what_to_install(tmp_path: Path):
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist"):
        encode("fashion-mnist", tmp_path / "out", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_missing_file_is_named(idx_root: Path, tmp_path: Path, name: str):
    (idx_root / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=f"{name}: not found"):
        encode("fashion-mnist", tmp_path / "out", idx_root)


def test_files_that_are_not_gzipped_are_read(idx_root: Path):
    gzipped = idx_root / "train-labels-idx1-ubyte.gz"
    expected = read_idx(gzipped.with_suffix(""), 1)
    gzipped.with_suffix("").write_bytes(gzip.decompress(gzipped.read_bytes()))
    gzipped.unlink()
    assert (read_idx(gzipped.with_suffix(""), 1) == expected).all()


LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 6])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (LABELS[:7], "too short"),
        (LABELS[:-1], "1 values instead of 2"),
        (LABELS + b"x", "3 values instead of 2"),
        (b"\1" + LABELS[1:], "not an idx file"),
        (LABELS[:2] + b"\x0d" + LABELS[3:], "not an idx file"),
        (LABELS[:3] + b"\3" + LABELS[4:] + bytes(10), "not an idx file"),
    ],
)
def test_bad_idx(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(DataError, match=f"labels: .*{message}"):
        read_idx(tmp_path / "labels", 1)


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(LABELS, mtime=0)[:-9], gzip.compress(LABELS, mtime=0)[:12] + b"\xff" * 20]
)
def test_bad_gzip(tmp_path: Path, content: bytes):
    (tmp_path / "labels.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.gz: cannot be read"):
        read_idx(tmp_path / "labels", 1)


def test_labels_out_of_range_or_of_another_count(idx_root: Path, tmp_path: Path):
    write_idx(idx_root / "train-labels-idx1-ubyte.gz", np.full(40, 10, np.uint8))
    with pytest.raises(DataError, match="label 10"):
        encode("fashion-mnist", tmp_path / "out", idx_root)
    write_idx(idx_root / "train-labels-idx1-ubyte.gz", np.zeros(39, np.uint8))
    with pytest.raises(DataError, match="40 images but 39 labels"):
        encode("fashion-mnist", tmp_path / "out", idx_root)
