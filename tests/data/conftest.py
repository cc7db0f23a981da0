from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gowide_dist.data.encode import Options, encode
from tests.idx import write_fashion_mnist


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 601 training and 203 validation images of 28x28, encoded."""
    root = tmp_path_factory.mktemp("small")
    write_fashion_mnist(root / "idx", 601, 203)
    encode("fashion-mnist", root / "out", root / "idx")
    return root / "out"


@pytest.fixture(scope="session")
def photo_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 241 training and 61 validation images of 40 to 120 px, encoded, half of them as JPEG."""
    root = tmp_path_factory.mktemp("photos")
    write_image_folder(root / "images", 241, 61)
    encode("imagefolder", root / "out", root / "images", Options(jpg_share=0.5, workers=1))
    return root / "out"


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colours, which JPEG preserves: uint8 [height, width, 3]."""
    corners = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
    return np.asarray(corners.resize((width, height), Image.Resampling.BICUBIC))


def write_image_folder(
    root: Path, num_train: int, num_val: int, num_classes: int = 4, least_px: int = 40, most_px: int = 120
) -> None:
    """JPEGs with sides of least_px to most_px in train/ and val/, a folder for each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for index in range(count):
            path = root / split / f"class {index % num_classes}" / f"{index:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(least_px, most_px + 1, 2)
            Image.fromarray(photo(rng, height, width)).save(path, quality=95)
