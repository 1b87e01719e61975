"""The local launcher, with a small program in place of the training."""

import signal
import socket
import sys
import threading
import time

import pytest

from lightning_jax import launch

HOST = """
import os, signal, sys, time
index, count = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
print("host", index, "of", count, "at", os.environ["JAX_COORDINATOR_ADDRESS"].partition(":")[0], *sys.argv[1:])
print(os.environ["XLA_FLAGS"].split()[-1], file=sys.stderr)
"""


@pytest.fixture
def program(monkeypatch):
    """Makes hosts run this after their first lines."""
    return lambda text: monkeypatch.setattr(launch, "COMMAND", (sys.executable, "-u", "-c", HOST + text))


def test_every_line_says_from_which_host_it_comes(program, capfd):
    program("")
    assert launch.main(["--hosts=3", "--devices=2", "--config=c.py", "--workdir=a b"]) == 0
    lines = capfd.readouterr().out.splitlines()
    devices = "--xla_force_host_platform_device_count=2"
    for index in range(3):
        assert [line for line in lines if line.startswith(str(index))] == [
            f"{index} | host {index} of 3 at localhost --config=c.py --workdir=a b",
            f"{index} | {devices}",
        ]


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(2)", 2),
        ("os.kill(os.getpid(), 9) if index else sys.exit(75)", 75),
        ("os.abort()", 75),
    ],
)
def test_the_exit_code_is_that_of_the_hosts(program, ends, code, capfd):
    program(ends)
    assert launch.main(["--hosts=2"]) == code


def test_hosts_are_started_again_until_it_helps(program, capfd, tmp_path):
    program(f"""
mark = "{tmp_path}/" + str(index)
if not os.path.exists(mark):
    open(mark, "w").close()
    sys.exit(75)
""")
    assert launch.main(["--hosts=2", "--restarts=3"]) == 0
    output = capfd.readouterr()
    assert output.out.count("host 1 of 2") == 2
    assert output.err == "launch: exit code 75; all hosts are started again, 3 times at most\n"


@pytest.mark.parametrize(("ignores", "presses", "code"), [("False", 1, 143), ("True", 2, 130)])
def test_ctrl_c_is_sigterm_to_all_hosts_and_the_second_kills_them(program, capfd, ignores, presses, code):
    program(f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN if {ignores} else lambda *a: sys.exit(143))
print("ready")
time.sleep(100)
""")

    def press():
        said = ""
        while said.count("ready") < 2:
            time.sleep(0.05)
            said += capfd.readouterr().out
        for _ in range(presses):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.5)

    main = threading.main_thread().ident
    presser = threading.Thread(target=press)
    presser.start()
    began = time.monotonic()
    assert launch.main(["--hosts=2"]) == code
    presser.join()
    assert time.monotonic() - began < 60


def test_hosts_that_do_not_end_after_another_failed_are_killed(program, capfd, monkeypatch):
    monkeypatch.setattr(launch, "_GRACE_S", 0.5)
    program("time.sleep(100 * index)\nsys.exit(75)")
    assert launch.main(["--hosts=2"]) == 75
    assert "launch: the other hosts did not end within 0 s and are killed" in capfd.readouterr().err


def test_a_reserved_port_is_for_who_was_told_it():
    with launch.reserved_port() as port:
        with socket.create_server(("", port)):
            pass
        with launch.reserved_port() as other:
            assert other != port


@pytest.mark.parametrize("option", ["--hosts=0", "--devices=0", "--restarts=-1"])
def test_a_number_that_makes_no_sense_is_one_line(option, capsys):
    with pytest.raises(SystemExit) as end:
        launch.main([option])
    assert end.value.code == 2
    assert f"error: {option}: give " in capsys.readouterr().err
