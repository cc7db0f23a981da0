"""A small finished run, for all that looks at one."""

import pytest

from gowide_dist import load_recipe
from gowide_dist.pipeline import prepare, walk
from tests.fashion import chain, encode_part, write_job


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A wide network and two others, trained on 600 images of Fashion-MNIST; `data` beside `runs`. The run."""
    root = tmp_path_factory.mktemp("finished")
    recipe = chain(encode_part(root, 600, 200))
    recipe["networks"]["basic"] = {"block": "basic", "depths": [1, 1], "base": 8, "stem": "small"}
    stages = recipe["stages"]
    stages["teacher"] |= {"epochs": 4}
    stages["baseline"] = {**stages["teacher"], "train": ["thin", "basic"], "epochs": 1}
    recipe["stages"] = {name: stages[name] for name in ("teacher", "baseline")}
    prepared = prepare(load_recipe(write_job(root, recipe)), root / "runs")
    walk(prepared.run, list(prepared.selected))
    return prepared.run
