"""A small finished run, for all that looks at one."""

import shutil

import pytest

from tests.fashion import chain, encode_part, train


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Networks trained for seconds on 2,000 images of Fashion-MNIST: `data` beside `runs/demo`. The run."""
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
