from pathlib import Path

import pytest

from gowide_dist.data.encode import encode_fashion_mnist
from tests.idx import write_fashion_mnist


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 601 training and 203 validation images of 28x28, encoded."""
    root = tmp_path_factory.mktemp("small")
    write_fashion_mnist(root / "idx", 601, 203)
    encode_fashion_mnist(root / "out", root / "idx")
    return root / "out"
