"""What a hanging run says: the line on who keeps whom waiting, and the stacks."""

import signal
import subprocess
import sys

import pytest

from lightning_jax.hosts import RESTART
from lightning_jax.hosts.progress import Progress, who_hangs

WAITS = Progress(6, "waiting for its devices", True)


@pytest.mark.parametrize(
    ("hosts", "line"),
    [
        (
            {"host 0 (a)": WAITS, "host 1 (b)": Progress(6, "reading its batch", False), "host 2 (c)": WAITS},
            "host 1 (b), reading its batch at step 6; host 0 (a), host 2 (c), waiting for its devices at step 6",
        ),
        (
            {"host 0 (a)": WAITS, "host 1 (b)": WAITS._replace(step=5)},
            "host 1 (b), waiting for its devices at step 5; host 0 (a), waiting for its devices at step 6",
        ),
        (
            {"host 0 (a)": WAITS, "host 1 (b)": WAITS},
            "host 0 (a), host 1 (b), waiting for its devices at step 6; no host is behind, so a device or the network "
            "between them hangs",
        ),
        (
            {"host 0 (a)": WAITS, "host 1 (b)": None},
            "host 1 (b), starting at step 0; host 0 (a), waiting for its devices",
        ),
    ],
)
def test_the_host_that_keeps_the_others_waiting_is_named_first(hosts, line):
    assert who_hangs(hosts, 60).startswith(f"nothing was done for 60 s: {line}")


HANGS = """
import time
from lightning_jax.hosts import Hosts, watch

def step_that_hangs():
    time.sleep(100)

hosts = Hosts()
with watch(hosts, 1.0):
    for step in range(20):
        hosts.at(step, "begins the step")
        time.sleep(0.1)
    hosts.at(20, "waiting for its devices", waits=True)
    step_that_hangs()
"""


def test_a_single_host_that_hangs_prints_its_stacks_and_ends():
    found = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert found.returncode == RESTART
    assert "in step_that_hangs" in found.stderr
    assert found.stderr.splitlines()[-1] == ("error: nothing was done for 1 s: waiting for its devices at step 20")


def test_a_run_that_makes_progress_is_left_alone():
    ends = HANGS.replace("    step_that_hangs()\n", "").replace("1.0", "1.9") + "time.sleep(2.5)\nprint('ended')\n"
    found = subprocess.run([sys.executable, "-c", ends], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (0, "ended\n", "")


HOLDS_PYTHON = """
import ctypes
from lightning_jax.hosts import Hosts, watch, watchdog

watchdog._GRACE_S = 1.0

def call_that_hangs():
    ctypes.PyDLL(None).sleep(100)  # without giving up Python's lock

with watch(Hosts(), 1.0):
    watchdog.time.sleep(0.5)
    call_that_hangs()
"""


def test_a_host_that_cannot_run_python_prints_its_stacks_and_dies():
    found = subprocess.run([sys.executable, "-c", HOLDS_PYTHON], capture_output=True, text=True, timeout=60)
    assert found.returncode == -signal.SIGALRM  # and is started again: 1 would be a run that failed
    assert "in call_that_hangs" in found.stderr
