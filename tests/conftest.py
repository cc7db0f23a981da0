"""For all tests."""

import os
import shutil

import pytest
from hypothesis import settings

# Before torch is imported, also by what tests start. Tests run side by side, one on each core: with a thread for each
# core every one of them, OpenMP's threads wait for each other most of the time, and burn the cores while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests start several processes and compare bits: on the CPU, also where there are GPUs, unless a test asks for them.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the files that wait for Slurm over the run, so that something else computes meanwhile."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
    waiting = [name for name in files if name.startswith("tests/slurm/")]
    others = [name for name in files if name not in waiting]
    part = -(-len(others) // max(1, len(waiting)))
    order: list[str] = []
    for index, name in enumerate(sorted(waiting, key=lambda name: -len(files[name]))):
        order += [name, *others[index * part : (index + 1) * part]]
    items[:] = [item for name in order or others for item in files[name]]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Networks trained for seconds on 2,000 images of Fashion-MNIST: `data` beside `runs/demo`. The run."""
    from tests.fashion import chain, encode_part, train

    root = tmp_path_factory.mktemp("finished")
    recipe = chain(encode_part(root, 2000, 1000), name="demo")
    recipe["networks"] = {
        "thin": {"block": "bottleneck", "depths": [1, 1], "base": 8, "stem": "strided"},
        "basic": {"block": "basic", "depths": [1, 1], "base": 8, "stem": "small"},
    }
    stage = recipe["stages"]["teacher"]
    recipe["stages"] = {
        "distill": {**stage, "train": "thin", "epochs": 4},
        "baseline": {**stage, "train": ["thin", "basic"], "epochs": 1},
        "eight": {**stage, "train": "basic", "init": "baseline", "epochs": 1, "quantised": "symmetric"},
    }
    (root / "runs").mkdir()
    return train(root / "runs", recipe)


@pytest.fixture(scope="module")
def moved(finished_run, tmp_path_factory):
    """The run's folder alone, on a machine where its data never were."""
    folder = tmp_path_factory.mktemp("laptop")
    shutil.copytree(finished_run.path, folder / "run")
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(finished_run.path.parents[1] / "data"), "/nowhere/data"))
    return folder / "run"
