import pickle
from pathlib import Path

import numpy as np
import pytest

from gowide_dist.data.beton import Beton
from gowide_dist.data.encode import encode
from gowide_dist.errors import DataError

RNG = np.random.default_rng(0)


def write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {"data": RNG.integers(0, 256, (20, 3072), np.uint8), "labels": RNG.integers(0, 10, 20).tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {"label_names": [f"name {label}" for label in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))


def test_cifar10(tmp_path: Path):
    write_cifar10(tmp_path)
    info = encode("cifar10", tmp_path / "out", tmp_path)
    assert info.classes[3] == "name 3" and info.fixed_side_px == 32
    assert (info.splits["train"].samples, info.splits["val"].samples) == (100, 20)
    content = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_2").read_bytes())
    beton = Beton(tmp_path / "out" / "train.beton")
    image = beton.bytes[beton.offsets[25] :][:3072].reshape(32, 32, 3)
    assert (image.transpose(2, 0, 1).ravel() == content["data"][5]).all()
    assert beton.labels[25] == content["labels"][5]


def test_the_inner_folder_may_be_given(tmp_path: Path):
    write_cifar10(tmp_path)
    assert encode("cifar10", tmp_path / "out", tmp_path / "cifar-10-batches-py").splits["train"].samples == 100


def test_cifar100_has_the_fine_labels(tmp_path: Path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 50), ("test", 10)):
        labels = RNG.integers(0, 100, count).tolist()
        content = {"data": RNG.integers(0, 256, (count, 3072), np.uint8), "fine_labels": labels, "coarse_labels": [0]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(label) for label in range(100)]}))
    info = encode("cifar100", tmp_path / "out", tmp_path)
    assert len(info.classes) == 100
    train = pickle.loads((folder / "train").read_bytes())
    assert Beton(tmp_path / "out" / "train.beton").labels.tolist() == train["fine_labels"]


class Evil:
    def __reduce__(self):
        return print, ("run",)


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"garbage", "cannot be read"),
        (pickle.dumps([1]), "no data or labels"),
        (pickle.dumps({"data": PIXELS}), "no data or labels"),
        (pickle.dumps({"data": PIXELS, "labels": [1]}), "not CIFAR images"),
        (pickle.dumps({"data": PIXELS[:, :5], "labels": [1, 2]}), "not CIFAR images"),
        (pickle.dumps({"data": PIXELS, "labels": [1, 10]}), "labels outside of 0 to 9"),
        (pickle.dumps({"data": PIXELS, "labels": ["a", "b"]}), "labels outside of 0 to 9"),
        (pickle.dumps({"data": Evil(), "labels": [1]}), "cannot be read .it asks for builtins.print"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").write_bytes(content)
    with pytest.raises(DataError, match=f"data_batch_4: .*{message}"):
        encode("cifar10", tmp_path / "out", tmp_path)
    assert "run" not in capsys.readouterr().out


def test_missing_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"batches\.meta: not found"):
        encode("cifar10", tmp_path / "out", tmp_path)
