"""Slurm's warning reaches training, and nothing that training has started."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, signal, subprocess, sys, time
from gowide_dist import stop
stop.listen()
child = subprocess.Popen([sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)"],
                         stdout=subprocess.PIPE)
child.stdout.readline()
os.kill(child.pid, stop.WARNING_SIGNAL)
os.kill(os.getpid(), stop.WARNING_SIGNAL)
deadline = time.monotonic() + 10
while not stop.received() and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.2)
print(stop.received(), child.poll())
child.kill()
"""


@pytest.mark.parametrize(("name", "number"), [("", signal.SIGUSR2), ("USR1", signal.SIGUSR1)])
def test_the_warning_is_recorded_and_kills_no_process_that_training_has_started(name, number):
    environment = {**os.environ, **({"SUBMITIT_PREEMPT_SIGNAL": name} if name else {})}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [str(int(number)), "None"]


def test_the_warning_is_heard_while_the_main_thread_computes():
    """It waits for no bytecode of the main thread, as a handler of Python's would."""
    script = "from gowide_dist import stop; stop.listen(); print('ready', flush=True); sum(range(10**8)); print(stop.received())"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=60)[0].strip() == str(int(signal.SIGUSR2))
