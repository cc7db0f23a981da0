"""Imports point one way, and what a login node runs does not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gowide_dist"
# From the top of the house down: a room may import from rooms below it, and from its own.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["options"],
    ["export"],
    ["insight"],
    ["bench"],
    ["steps"],
    ["pipeline"],
    ["launch"],
    ["prepare"],
    ["train"],
    ["data"],
    ["run"],
    ["identity"],
    ["effects"],
    ["recipe"],
    ["instances"],
    ["stages"],
    ["networks"],
    ["schema", "world", "progress", "timeline", "environment"],
    ["files", "stop", "machine"],
    ["errors"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names = [
                f"{node.module}.{alias.name}" if node.module == "gowide_dist" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("gowide_dist."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return  # offers names of all rooms, imported on first use
    for other in imported_rooms(path):
        assert other == room or LEVEL[room] < LEVEL[other], f"{room} may not import {other}"


def test_every_room_has_its_floor():
    rooms = {
        path.name.removesuffix(".py")
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize(
    "module", ["cli", "pipeline", "bench", "prepare", "recipe", "run", "identity", "networks.architecture", "networks.foreign", "launch.local", "launch.slurm", "launch.chain", "launch.queue", "launch.profile", "insight.status", "data.info", "data.preprocessing", "networks.normalise"]
)  # fmt: skip
def test_login_nodes_import_no_torch(module):
    code = (
        f"import sys, gowide_dist.{module}; print(*sorted({{'torch', 'ffcv', 'numba', 'submitit'}} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
