"""Small parts of the real Fashion-MNIST, and recipes that train on them in seconds."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gowide_dist import load_recipe
from gowide_dist.data.encode import encode
from gowide_dist.pipeline import walk
from gowide_dist.prepare import prepare
from gowide_dist.run import Run
from tests.idx import write_idx

SOURCE = Path("/usr/share/datasets/fashion-mnist")


def write_part(root: Path, num_train: int, num_val: int) -> None:
    """The first images of each part, in the files of Fashion-MNIST."""
    root.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", num_train), ("t10k", num_val)):
        for kind, head in (("images-idx3", 16), ("labels-idx1", 8)):
            name = f"{prefix}-{kind}-ubyte.gz"
            values = np.frombuffer(gzip.decompress((SOURCE / name).read_bytes()), np.uint8, offset=head)
            shape = (-1, 28, 28) if "images" in kind else (-1,)
            write_idx(root / name, values.reshape(shape)[:count])


def encode_part(root: Path, num_train: int, num_val: int) -> Path:
    """The first images of each part, encoded: the folder of the FFCV files."""
    write_part(root / "idx", num_train, num_val)
    encode("fashion-mnist", root / "data", root / "idx")
    return root / "data"


def chain(data: Path, /, **changes: Any) -> dict[str, Any]:
    """A recipe of the whole chain with tiny networks on the files in `data`."""
    optim = {"lr": 0.05}
    return {
        "name": "chain",
        "data": {
            "train": str(data / "train.beton"),
            "val": str(data / "val.beton"),
            "resolution": 28,
            "augment": {"flip": True, "translate": 2},
        },
        "batch_size": 60,
        "networks": {
            "thin": {"block": "bottleneck", "depths": [1, 1], "base": 4, "width": 0.5, "stem": "strided"},
            "wide": {"widen": "thin", "by": 4},
        },
        "stages": {
            "teacher": {"train": "wide", "objective": "labels", "epochs": 2, "optim": optim},
            "imitate": {"train": "thin", "objective": "blocks", "teacher": "teacher", "epochs": 2, "optim": optim},
            "distill": {
                "train": "thin", "init": "imitate", "objective": "kl", "teacher": "teacher", "temperature": 4.0,
                "epochs": 2, "optim": optim,
            },
            "finetune": {"train": "thin", "init": "distill", "objective": "labels", "epochs": 1, "optim": optim},
        },
        "log_every_steps": 4,
        "checkpoints": {"every_steps": 3},
        **changes,
    }  # fmt: skip


def write_job(folder: Path, recipe: dict[str, Any]) -> Path:
    """The recipe as a YAML file."""
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def train(runs: Path, recipe: dict[str, Any], *only: str) -> Run:
    """The run of a recipe, or of those stages of it, trained in this process."""
    prepared = prepare(load_recipe(write_job(runs, recipe)), runs, only=only)
    walk(prepared.run, list(prepared.selected))
    return prepared.run


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a metrics file without what differs from run to run."""
    times = ("images_per_s", "data_wait", "comm_wait", "seconds")
    return [{name: value for name, value in line.items() if name not in times} for line in lines]
