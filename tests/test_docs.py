"""Every command of the documentation, as it stands there, in a folder like a clone with little data.

Those that need a cluster are run by tests/slurm/test_docs.py, on a real one.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.command import GOWIDE
from tests.docs import PAGES, ROOT, commands, fenced_blocks, make_sandbox


def needs_a_cluster(page: Path) -> bool:
    return page.name == "clusters.md"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    make_sandbox(folder)
    subprocess.run([GOWIDE, "run", "jobs/demo.yaml", "--nproc", "1"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if not needs_a_cluster(page)], ids=lambda page: page.name)
def test_commands(sandbox: Path, page: Path):
    path = f"{Path(GOWIDE).parent}:{os.environ['PATH']}"
    for command in commands(page):
        program, *arguments = shlex.split(command)
        if program == "make":
            subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            continue
        assert program in ("gowide", "pip"), f"{page.name}: `{command}` is neither ours nor pip"
        if program == "pip":
            arguments.insert(1, "--dry-run") if arguments[0] == "install" else None
            program, arguments = "python", ["-m", "pip", *arguments]
            done = _run([program, *arguments], ROOT, path)
        else:
            done = _run([program, *arguments], sandbox, path)
        assert done.returncode == 0, f"{page.name}: `{command}`: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr


def _run(command: list[str], cwd: Path, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_is_documented():
    """Each of `gowide --help`'s commands is used somewhere in the pages."""
    listed = subprocess.run([GOWIDE, "--help"], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^│ ([a-z]+) ", listed, re.MULTILINE)
    text = "".join(page.read_text() for page in PAGES)
    assert len(names) > 8
    assert [name for name in names if f"gowide {name}" not in text] == []
    assert any(fenced_blocks(page, "bash") for page in PAGES)
