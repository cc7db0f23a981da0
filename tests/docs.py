"""The documentation's examples, for tests that run them as they stand there."""

import re
import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from gowide_dist.data.encode import Options, encode
from tests.data.conftest import write_image_folder
from tests.fashion import encode_part

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def fenced_blocks(page: Path, language: str) -> list[str]:
    """The contents of a Markdown page's ```language blocks, in order."""
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, without comments."""
    lines = [line.partition(" #")[0].strip() for block in fenced_blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


def scripts(page: Path) -> dict[str, str]:
    """The Python blocks of a page that begin with `# NAME.py`, by that name."""
    found = {}
    for block in fenced_blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            found[name[1]] = block
    return found


def make_sandbox(folder: Path) -> None:
    """A folder like a clone of this repository, where training takes seconds.

    The recipes on Fashion-MNIST read its first 600 images and train each stage for an epoch; `photos` is an ImageFolder, and
    `elpv_dataset` a package of 80 pictures in place of the real one.
    """
    for name in ("jobs", "slurm"):
        shutil.copytree(ROOT / name, folder / name)
    for path in (folder / "slurm" / "clusters").glob("*.yaml"):  # temporary folders are no node's own here
        profile = yaml.safe_load(path.read_text()) | {"node_local": []}
        path.write_text(yaml.safe_dump(profile, sort_keys=False))
    small = encode_part(folder / "small", 600, 200)
    for name in ("demo", "fashion_mnist", "fashion_mnist_basic", "photos"):
        path = folder / "jobs" / f"{name}.yaml"
        recipe = yaml.safe_load(path.read_text())
        if name != "photos":
            recipe["data"] |= {part: f"small/data/{part}.beton" for part in ("train", "val")}
            recipe["batch_size"] = 60
        chain = ("teacher", "imitate", "distill", "finetune", "baseline")  # the study compares many more
        recipe["stages"] = {stage: recipe["stages"][stage] for stage in chain if stage in recipe["stages"]}
        for stage in recipe["stages"].values():
            stage["epochs"] = 1
            stage.get("schedule", {}).pop("warmup_epochs", None)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert small == folder / "small" / "data"
    write_image_folder(folder / "photos", 80, 20)
    (folder / "imagenet").symlink_to("photos")
    write_elpv(folder / "elpv_dataset")
    for page in PAGES:
        for name, script in scripts(page).items():
            (folder / name).write_text(script)
    encode("imagefolder", folder / "data" / "mine", folder / "photos", Options(jpg_share=1.0, workers=1))


def write_elpv(package: Path) -> None:
    """A package like elpv-dataset's: grey photographs of cells, and a table of their defects."""
    rng = np.random.default_rng(0)
    (package / "data" / "images").mkdir(parents=True)
    (package / "__init__.py").touch()
    with (package / "data" / "labels.csv").open("w") as table:
        for index in range(80):
            name = f"images/cell{index:04}.png"
            Image.fromarray(rng.integers(0, 255, (160, 160), dtype=np.uint8)).save(package / "data" / name)
            table.write(f"{name}  {('0.0', '1.0', '0.3333333333333333')[index % 3]}  {('mono', 'poly')[index % 2]}\n")
