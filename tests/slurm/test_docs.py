"""The commands of docs/clusters.md, as they stand there, on the dev cluster."""

import os
import subprocess
from pathlib import Path

from tests.command import GOWIDE
from tests.docs import DOCS, commands, make_sandbox


def test_commands_of_the_page_on_clusters(cluster, tmp_path):
    make_sandbox(tmp_path)
    env = {**os.environ, "PATH": f"{Path(GOWIDE).parent}:{os.environ['PATH']}"}
    page = commands(DOCS / "clusters.md")
    assert any("--dry-run" not in command for command in page if command.startswith("gowide submit"))
    for command in page:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"`{command}`: {done.stdout}{done.stderr}"
    assert not cluster.run("squeue", "-h", "--states=PENDING,RUNNING")
