"""Running the `gowide` command as a user does."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from gowide_dist.cli import main

GOWIDE = str(Path(sys.executable).with_name("gowide"))
LIMIT_S = 300
# A shell's background processes and those of nohup, as these tests may be, ignore some of the signals that they send.
HEARING = ["env", "--default-signal=INT,QUIT,HUP"]


def gowide(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The finished command."""
    return subprocess.run(
        [GOWIDE, *map(str, arguments)],
        capture_output=True, text=True, timeout=LIMIT_S, cwd=cwd, env={**os.environ, **(env or {})}, check=False,
    )  # fmt: skip


def refused(*arguments: object, cwd: Path | None = None) -> str:
    """The one line with which the command refuses, in this process: it has imported already what takes seconds."""
    told, interrupt = io.StringIO(), signal.getsignal(signal.SIGINT)
    with (
        mock.patch.object(sys, "argv", ["gowide", *map(str, arguments)]),
        mock.patch.dict(os.environ),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stderr(told),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        try:
            main()
        except SystemExit as leaving:
            status = leaving.code
        finally:
            signal.signal(signal.SIGINT, interrupt)
    return _line(status, printed.getvalue(), told.getvalue())


def refused_by_a_process(*arguments: object, cwd: Path | None = None) -> str:
    """The same of a command in a process of its own, or in those that it starts."""
    result = gowide(*arguments, cwd=cwd)
    return _line(result.returncode, result.stdout, result.stderr)


def _line(status: object, printed: str, told: str) -> str:
    assert status == 2, printed + told
    assert told.startswith("gowide: ")
    assert told.count("\n") == 1, told
    return told.removeprefix("gowide: ").strip()


def killed_when(moment: Callable[[], bool], *arguments: object) -> None:
    """Start the command and end all its processes with SIGKILL as soon as `moment` is there."""
    process = subprocess.Popen(
        [GOWIDE, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not moment():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "the moment to kill it never came"
            time.sleep(0.002)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended: the assertion says how
            os.killpg(process.pid, 9)
        process.wait()
        process.stderr.close()
