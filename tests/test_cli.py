"""The command line: its output and exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import typer
from PIL import Image

import gowide_dist
from gowide_dist.cli import app
from gowide_dist.data.encode import encode
from gowide_dist.errors import UserError
from tests.command import GOWIDE, HEARING, LIMIT_S, gowide, refused_by_a_process
from tests.idx import write_fashion_mnist

DEMO = Path(__file__).parents[1] / "jobs" / "demo.yaml"


def test_encode_then_verify(tmp_path):
    write_fashion_mnist(tmp_path / "idx", 50, 20)
    encoded = gowide("encode", "fashion-mnist", "--root", tmp_path / "idx", "--out", tmp_path / "data", "--subset", 30)
    assert encoded.returncode == 0, encoded.stderr
    assert "30 train, 20 val images in 10 classes" in encoded.stdout
    verified = gowide("data", "verify", tmp_path / "data")
    assert verified.returncode == 0, verified.stderr
    assert "OK, 30 train, 20 val images" in verified.stdout
    beton = tmp_path / "data" / "train.beton"
    beton.write_bytes(beton.read_bytes()[:-8] + b"12345678")
    damaged = gowide("data", "verify", tmp_path / "data")
    assert damaged.returncode == 2
    assert damaged.stderr.splitlines()[-1].startswith("gowide: ")
    assert "train.beton" in damaged.stderr.splitlines()[-1]


def test_encode_an_image_folder(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(folder / "one.png")
    arguments = ("encode", "imagefolder", "--root", tmp_path / "images")
    assert gowide(*arguments, "--out", tmp_path / "jpg").returncode == 0
    assert gowide(*arguments, "--out", tmp_path / "raw", "--write-mode", "raw").returncode == 0
    encodings = [json.loads((tmp_path / name / "dataset.json").read_text())["encoding"] for name in ("jpg", "raw")]
    assert encodings[0]["jpg_share"] == 1.0
    assert encodings[1].get("jpg_share", 0.0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "cifar10", "--out", "x"], "encode cifar10: give the folder of the dataset as --root"),
        (["encode", "fashion-mnist", "--out", "x", "--root", "nowhere"], "nowhere: not found"),
        (
            ["encode", "fashion-mnist", "--out", "x", "--write-mode", "as it is"],
            "--write-mode as it is: should be raw, jpg or a fraction",
        ),
        (
            ["encode", "fashion-mnist", "--out", "x", "--write-mode", "bmp"],
            "--write-mode bmp: should be raw, jpg or a fraction",
        ),
        (["encode", "fashion-mnist", "--out", "x", "--quality", "0"], "Invalid value for '--quality'"),
        (
            ["encode", "fashion-mnist", "--out", "x", "--write-mode", "2"],
            "--write-mode 2: should be raw, jpg or a fraction",
        ),
        (["encode", "mnist", "--out", "x"], "'mnist' is not one of 'fashion-mnist', 'cifar10'"),
        (["runn"], "No such command 'runn'"),
        (["run"], "Missing argument 'JOB'; see `gowide run --help`"),
        (["run", "a.yaml", "--nproc", "0"], "Invalid value for '--nproc'"),
        (["run", DEMO, "seed=9223372036854775808"], "seed: should be less than 9223372036854775808"),
        (["encode", "fashion-mnist", "--out", "x", "--dry-run"], "encode --dry-run: prints the script of a Slurm job"),
        (["data", "verify", "nowhere"], "nowhere/dataset.json: not found"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["report", "nowhere"], "nowhere: not a run directory"),
        (["status", "nowhere"], "nowhere: not a run directory"),
        (["eval", "nowhere", "finetune"], "nowhere: not a run directory"),
        (["plan", DEMO, "stages={}"], "stages: should not be empty"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    assert message in refused_by_a_process(*arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    write_fashion_mnist(tmp_path / "idx", 50, 20)
    (tmp_path / "file").write_text("mine")
    encode = ("encode", "fashion-mnist", "--root", tmp_path / "idx", "--out")
    assert refused_by_a_process(*encode, tmp_path / "file").endswith("file: is not a folder; choose another --out")
    assert gowide(*encode, tmp_path / "data").returncode == 0
    run = ("run", DEMO, f"data.train={tmp_path}/data/train.beton", f"data.val={tmp_path}/data/val.beton")
    line = refused_by_a_process(*run, "batch_size=10", "--runs", tmp_path / "file")
    assert line.endswith("file: is not a folder; choose another place with --runs")
    assert (tmp_path / "file").read_text() == "mine"


def test_help_without_arguments():
    for arguments in ([], ["data"]):
        result = gowide(*arguments)
        assert (result.returncode, result.stderr) == (2, "")
        assert "Usage: gowide" in result.stdout
    assert gowide("--version").stdout.startswith(f"gowide_dist {metadata.version('gowide_dist')}")


def commands(command, *words):
    """All commands under a command, with the words that call them."""
    if not hasattr(command, "commands"):
        yield " ".join(words), command
    else:
        for name, below in command.commands.items():
            yield from commands(below, *words, name)


def test_every_help_gives_an_example():
    found = dict(commands(typer.main.get_command(app)))
    assert {"run", "plan", "doctor", "data verify"} < set(found)
    for words, command in found.items():
        assert f"Example: `gowide {words}" in command.help, words
    shown = gowide("plan", "--help")
    assert shown.returncode == 0
    assert "Example: gowide plan jobs/" in " ".join(shown.stdout.replace("│", " ").split())


@pytest.mark.parametrize(
    "variables",
    [
        {"FORCE_COLOR": "1", "PY_COLORS": "1", "TERM": "xterm-256color"},
        {"TTY_COMPATIBLE": "1", "PYTHONIOENCODING": "ascii:strict"},
        {"GITHUB_ACTIONS": "true", "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_a_file_gets_text_whatever_the_variables_say(tmp_path, variables):
    write_fashion_mnist(tmp_path / "idx", 50, 20)
    encode("fashion-mnist", tmp_path / "größe", tmp_path / "idx")
    for arguments in (["data", "verify", tmp_path / "größe"], ["encode", "--help"]):
        result = gowide(*arguments, env=variables)
        assert result.returncode == 0, result.stderr
        assert "\x1b" not in result.stdout + result.stderr
        assert result.stdout.isascii() or len(variables.keys() & {"PYTHONIOENCODING", "LC_ALL"}) == 0


def paths_of_commands():
    """Each path that a command takes, by the command's words and its name: arguments with a variable there."""
    for words, command in commands(typer.main.get_command(app)):
        kinds = {param.name: param.type_descriptor.annotation for param in command.params}
        for tested in (param for param in command.params if "Path" in str(kinds[param.name])):
            arguments = words.split()
            for param in command.params:
                if param.required or param is tested:
                    choice = next((choice for choice in get_args(kinds[param.name]) if isinstance(choice, str)), "x")
                    value = "$GOWIDE_NOT_SET/x" if param is tested else choice
                    arguments += [param.opts[0], value] if param.opts[0].startswith("-") else [value]
            yield pytest.param(arguments, id=f"{words} {tested.name}")


@pytest.mark.parametrize("arguments", [*paths_of_commands()])
def test_every_path_of_a_command_takes_variables(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\$GOWIDE_NOT_SET/x: the variable GOWIDE_NOT_SET is not set; set it, or"):
        app(arguments, standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


def test_home_and_variables_from_end_to_end(tmp_path):
    write_fashion_mnist(tmp_path / "my idx", 50, 20)
    places = {"HOME": str(tmp_path / "home"), "MY_SCRATCH": str(tmp_path)}
    made = gowide("encode", "fashion-mnist", "--root=${MY_SCRATCH}/my idx", "--out=~/data", cwd=tmp_path, env=places)
    assert made.returncode == 0, made.stderr
    data = ("data.train=~/data/train.beton", "data.val=$HOME/data/val.beton", "batch_size=10")
    planned = gowide("plan", DEMO, *data, "--json", cwd=tmp_path, env=places)
    assert json.loads(planned.stdout)["data"]["source"] == str(tmp_path / "home" / "data")
    assert gowide("data", "verify", "~/data", cwd=tmp_path, env=places).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "my idx"]


def completed(*words):
    """What the shell offers for the last word."""
    line = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    return gowide(env={"_GOWIDE_COMPLETE": "complete_bash", **line}).stdout.split()


def test_the_shell_completes():
    assert "complete_bash" in gowide(env={"_GOWIDE_COMPLETE": "source_bash"}).stdout
    assert completed("gowide", "pl") == ["plan"]
    assert completed("gowide", "run", str(DEMO), "--only", "dis") == ["distill", "distill/thin"]
    assert completed("gowide", "run", "nowhere.yaml", "--only", "dis") == []


def test_ctrl_c_while_encoding(tmp_path):
    """As a terminal sends it: to all processes of the command."""
    command = [*HEARING, GOWIDE, "encode", "fashion-mnist", "--out", tmp_path / "data"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + LIMIT_S
        while not (tmp_path / "data" / ".partial" / "train.beton").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        complaints = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 130
    assert complaints.splitlines()[-1] == "gowide: stopped; run the same command again to resume"
    assert "Traceback" not in complaints
    assert not (tmp_path / "data" / "dataset.json").exists()


def test_the_package_as_a_module():
    """`python -m gowide_dist` is the command."""
    command = [sys.executable, "-m", "gowide_dist"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == gowide("--version").stdout
    wrong = subprocess.run([*command, "run"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "gowide: Missing argument 'JOB'; see `gowide run --help`\n")


def test_the_names_of_the_package():
    assert all(hasattr(gowide_dist, name) for name in gowide_dist.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gowide_dist.nothing
