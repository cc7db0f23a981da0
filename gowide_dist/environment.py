"""What a run was made with: code, packages, machine and command."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from gowide_dist.machine import num_cores

_PACKAGES = ("torch", "torchvision", "ffcv", "numpy", "numba", "submitit", "pydantic", "safetensors")
_EXTRAS = ("timm",)  # noted where they are installed
VERSION_FILE = "gowide_dist_version.json"  # beside a copy of the package


def describe_environment(devices: list[str], world_size: int) -> dict[str, Any]:
    """The content of a run's environment.json."""
    return {
        **code_version(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES} | _extras(),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": num_cores(),
        "devices": devices,
        "world_size": world_size,
        "command": sys.argv,
    }


def _extras() -> dict[str, str]:
    versions = {}
    for name in _EXTRAS:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def code_version() -> dict[str, Any]:
    """The version of this package, its git commit and whether the files differ from it.

    Of a copy of the package: what was noted when it was copied.
    """
    folder = Path(__file__).parent
    if (noted := folder.parent / VERSION_FILE).exists():
        return dict(json.loads(noted.read_text()))

    def git(*arguments: str) -> str | None:
        if not shutil.which("git"):
            return None
        result = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".")
    return {
        "gowide_dist": metadata.version("gowide_dist"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }
