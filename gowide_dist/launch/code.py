"""The package as it was when jobs were submitted: a copy in the run, which they import."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from pathlib import Path

import gowide_dist
from gowide_dist.environment import VERSION_FILE, code_version
from gowide_dist.files import temporary_name

_PACKAGE = Path(gowide_dist.__file__).parent
_BEING_COMPILED = shutil.ignore_patterns("*.tmp.*", "*.pyc.*")  # files of numba and Python that vanish while we copy


@functools.cache
def digest() -> str:
    """The first digits of the SHA-256 of the package's files and their names."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.is_file() and path.parent.name != "__pycache__":
            digest.update(f"{path.relative_to(_PACKAGE)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def code_folder(folder: Path) -> Path:
    """Where jobs whose files are in `folder` find the package as it is now: jobs of an older one keep their own."""
    return folder / "code" / digest()


def copy_package(to: Path) -> None:
    """Copy the package, with what Python and numba have compiled of it, and note its version; once."""
    if to.exists():
        return
    unfinished = to.with_name(temporary_name(to.name))
    try:
        shutil.copytree(_PACKAGE, unfinished / _PACKAGE.name, ignore=_BEING_COMPILED)
        (unfinished / VERSION_FILE).write_text(json.dumps(code_version()))
        unfinished.rename(to)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def has_changed(folder: Path, job_id: str) -> bool:
    """Whether a job imports a copy of the package that differs from the package as it is now."""
    try:
        script = (folder / f"{job_id}_submission.sh").read_text()
    except OSError:
        return False
    copied = re.search(r"^export PYTHONPATH=.*/code/([0-9a-f]{16})\b", script, re.MULTILINE)
    return copied is not None and copied[1] != digest()
