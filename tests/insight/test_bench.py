from pathlib import Path

import pytest

from gowide_dist.data.encode import Options, encode_image_folder
from gowide_dist.errors import DataError
from gowide_dist.insight import bench
from tests.data.conftest import write_image_folder


def test_loader_against_the_usual_ways(tmp_path: Path):
    write_image_folder(tmp_path / "images", 64, 4)
    encode_image_folder(tmp_path / "out", tmp_path / "images", Options(jpg_share=1.0, workers=1))
    result = bench.loader(tmp_path / "out", tmp_path / "images", batch_size=16, resolution=32, num_threads=1)
    rates = result["images_per_s"]
    assert set(rates) == {"gowide_dist", "ffcv", "torchvision", "decode_only"} == set(result["memory_mib"])
    assert all(rate > 0 for rate in rates.values())
    assert all(result[key] > 0 for key in ("over_ffcv", "over_torchvision", "of_decode_only", "memory_over_ffcv"))
    assert result["of_decode_only"] < 2


def test_missing_folders_are_errors(tmp_path: Path):
    with pytest.raises(DataError, match=r"dataset\.json: not found"):
        bench.loader(tmp_path)
    write_image_folder(tmp_path / "images", 4, 4)
    encode_image_folder(tmp_path / "out", tmp_path / "images", Options(workers=1))
    with pytest.raises(DataError, match="--images"):
        bench.loader(tmp_path / "out", tmp_path / "nowhere")
