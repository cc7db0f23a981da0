"""Tests run in as many processes as there are cores, a file in one of them, all on Slurm's cluster in the same one."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

SLURM = Path(__file__).parent / "slurm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = SLURM.name if SLURM in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: SLURM not in item.path.parents)  # the longest group first
