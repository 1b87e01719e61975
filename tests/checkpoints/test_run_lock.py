import os
import signal
import subprocess
import sys

import pytest

from lightning_jax.checkpoints import RunLockError, run_lock

HOLD = """
import os, sys, time
from lightning_jax.checkpoints import run_lock
with run_lock(sys.argv[1]):
    if "fork" not in sys.argv or os.fork() == 0:  # a child speaks when it has let go of the lock
        print("held", flush=True)
        os.close(1)
    time.sleep(30)
"""


@pytest.fixture
def holder(tmp_path):
    def start(*arguments):
        command = [sys.executable, "-c", HOLD, tmp_path, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    started = []
    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_run_is_refused_by_a_line_that_names_the_first(tmp_path, holder):
    process = holder()
    line = rf"{tmp_path} is in use by process {process.pid} on {os.uname().nodename} since 20..-..-.. .*; stop that run"
    with pytest.raises(RunLockError, match=line), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("arguments", [(), ("fork",)])
def test_the_lock_ends_with_its_process_even_when_killed_and_survived_by_a_child(tmp_path, holder, arguments):
    process = holder(*arguments)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with run_lock(tmp_path):
        pass


def test_the_lock_is_exclusive_within_a_process_and_free_afterwards(tmp_path):
    with run_lock(tmp_path / "run"):
        with pytest.raises(RunLockError, match=f"process {os.getpid()} "), run_lock(tmp_path / "run"):
            pass
        with run_lock(tmp_path / "other"):
            pass
    with run_lock(tmp_path / "run"):
        pass
