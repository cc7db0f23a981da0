import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gowide_dist.data.beton import Beton
from gowide_dist.data.info import check_split, read_dataset_info
from gowide_dist.errors import DataError


def copy(folder: Path, copied: Path) -> Path:
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def test_import_is_light():
    code = "import sys, gowide_dist.data.info; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "gowide_dist.data.info" in loaded
    assert not {"torch", "numpy", "numba", "ffcv", "cv2"} & set(loaded)


def test_checks_pass_on_a_whole_dataset(small_set: Path):
    info = read_dataset_info(small_set / "train.beton")
    assert (info.splits["train"].samples, info.splits["val"].samples) == (601, 203)
    assert info.fixed_side_px == info.min_side_px == info.max_side_px == 28
    assert check_split(small_set / "val.beton") == info.splits["val"]


def test_missing_dataset_json(tmp_path: Path):
    with pytest.raises(DataError, match=r"dataset\.json: not found; .*gowide encode"):
        read_dataset_info(tmp_path / "train.beton")


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"format": 2}', "\x00\xff"])
def test_damaged_dataset_json(small_set: Path, tmp_path: Path, damage: str):
    copy(small_set, tmp_path)
    (tmp_path / "dataset.json").write_text(damage)
    with pytest.raises(DataError, match=r"dataset\.json: .*gowide encode") as error:
        check_split(tmp_path / "train.beton")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "edited", [{"mean": [0.485, 0.456, 0.406]}, {"std": [0.5, 0.5, 0.5]}, {"moments_checksum": "0"}]
)
def test_moments_are_those_that_fingerprints_stand_for(small_set: Path, tmp_path: Path, edited: dict[str, Any]):
    copy(small_set, tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**content, **edited}))
    with pytest.raises(DataError, match=r"mean and std are no longer those of the images; .* networks.NAME.normalise"):
        read_dataset_info(tmp_path / "train.beton")
    del content["moments_checksum"]  # of an older version
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert read_dataset_info(tmp_path / "train.beton") == read_dataset_info(small_set / "train.beton")


def test_unknown_key_is_named(small_set: Path, tmp_path: Path):
    copy(small_set, tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "colour": 1}))
    with pytest.raises(DataError, match="colour"):
        read_dataset_info(tmp_path / "train.beton")


def test_missing_truncated_and_foreign_beton(small_set: Path, tmp_path: Path):
    copy(small_set, tmp_path)
    (tmp_path / "other.beton").write_bytes(b"")
    with pytest.raises(DataError, match="not one of the files"):
        check_split(tmp_path / "other.beton")
    with (tmp_path / "train.beton").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="1,000 bytes instead of"):
        check_split(tmp_path / "train.beton")
    (tmp_path / "train.beton").unlink()
    with pytest.raises(DataError, match="No such file"):
        check_split(tmp_path / "train.beton")


@pytest.mark.parametrize("offset", [0, 3000, -1])
def test_changed_index_is_found(small_set: Path, tmp_path: Path, offset: int):
    path = copy(small_set, tmp_path) / "train.beton"
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        Beton(path)
