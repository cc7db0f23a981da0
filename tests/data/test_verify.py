from pathlib import Path

import pytest

from gowide_dist.data.beton import Beton
from gowide_dist.data.encode import encode
from gowide_dist.data.verify import verify_dataset
from gowide_dist.errors import DataError
from tests.data.conftest import write_image_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_image_folder(tmp_path / "images", 24, 8)
    encode("imagefolder", tmp_path / "out", tmp_path / "images")
    return tmp_path / "out"


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_whole_dataset(folder: Path, small_set: Path, capsys: pytest.CaptureFixture[str]):
    assert verify_dataset(folder).splits["train"].samples == 24
    verify_dataset(small_set)
    assert "fault" not in capsys.readouterr().err


def test_one_changed_pixel_is_found(folder: Path):
    beton = Beton(folder / "train.beton")
    offset = int(beton.offsets[3] + beton.sizes[3] // 2)
    change(folder / "train.beton", offset, bytes([beton.bytes[offset] ^ 1]))
    with pytest.raises(DataError, match=r"train\.beton: its checksum"):
        verify_dataset(folder)


def test_images_that_cannot_be_decoded_are_named(folder: Path, capsys: pytest.CaptureFixture[str]):
    beton = Beton(folder / "val.beton")
    for index in (2, 5):
        change(folder / "val.beton", int(beton.offsets[index]), b"\0" * 100)
    with pytest.raises(DataError, match="3 faults") as error:
        verify_dataset(folder)
    assert "\n" not in str(error.value)
    output = capsys.readouterr().err
    assert "image 2:" in output and "image 5:" in output and "image 3:" not in output


def test_every_file_is_checked(folder: Path):
    change(folder / "train.beton", 0, b"\xff")
    (folder / "val.beton").unlink()
    with pytest.raises(DataError, match="2 faults"):
        verify_dataset(folder)
