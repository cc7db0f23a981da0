"""Every command of the documentation, as it stands there, in a folder like a clone with little data.

Those that need a cluster are run by tests/slurm/test_docs.py, on a real one.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.command import GOWIDE
from tests.docs import PAGES, ROOT, commands, fenced_blocks, make_sandbox


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    make_sandbox(folder)
    subprocess.run([GOWIDE, "run", "jobs/demo.yaml", "--nproc", "1"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def run_already() -> set[str]:
    return set()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "clusters.md"], ids=lambda page: page.name)
def test_commands(sandbox: Path, page: Path, run_already: set[str]):
    for command in dict.fromkeys(commands(page)):
        if command in run_already:  # by an earlier page
            continue
        run_already.add(command)
        program, *arguments = shlex.split(command.removeprefix("OMP_NUM_THREADS=1 "))  # as all tests have it
        if program == "make":
            subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            continue
        if program == "pip":  # `make_sandbox` has written what it would download
            continue
        program = {"gowide": GOWIDE, "python": sys.executable}[program]
        done = subprocess.run([program, *arguments], cwd=sandbox, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name}: `{command}`: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)  # code has brackets too
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_recipe_line_by_line_is_the_demo_s():
    [explained, *_] = fenced_blocks(ROOT / "docs" / "recipes.md", "yaml")
    assert yaml.safe_load(explained) == yaml.safe_load((ROOT / "jobs" / "demo.yaml").read_text())


def test_every_command_is_documented():
    """Each of `gowide --help`'s commands is used somewhere in the pages."""
    listed = subprocess.run([GOWIDE, "--help"], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^│ ([a-z]+) ", listed, re.MULTILINE)
    text = "".join(page.read_text() for page in PAGES)
    assert len(names) > 8
    assert [name for name in names if f"gowide {name}" not in text] == []
    assert any(fenced_blocks(page, "bash") for page in PAGES)
