"""Code in the sandbox tries what it should not, and fails."""

import dataclasses
import os
import shutil
import subprocess
import time

import pytest
from sandboxes import LIMITS, isolated

from lightning_jax.errors import UserError
from lightning_jax.rewards import FunctionTests, Program, Sandbox

ATTEMPTS = {  # what each prints as its last line where the sandbox holds
    "no network": (
        "import socket; print(socket.if_nameindex() in ([], [(1, 'lo')]))\n"
        "try: socket.create_connection(('1.1.1.1', 53), 2)\nexcept OSError: print('held')"
    ),
    "no socket of the machine": (
        "import socket\ntry: socket.socket(socket.AF_UNIX).connect('/run/docker.sock')\nexcept OSError: print('held')"
    ),
    "no writing outside /tmp": (
        "import os\nwritten = []\n"
        "for folder in ('/', '/usr', '/etc', '/dev', '/dev/shm', '/proc', '/usr/lib/python3'):\n"
        "    try: open(os.path.join(folder, 'x'), 'w'); written.append(folder)\n"
        "    except OSError: pass\n"
        "print(written or 'held')"
    ),
    "no files of the machine": (
        "import os\nseen = [each for each in ('/root', '/home', '/work', '/etc/passwd', '/etc/shadow', '/var', '/sys')"
        " if os.path.exists(each)]\nprint(seen or 'held')"
    ),
    "no environment of ours": "import os; print('held' if 'LIGHTNING_SECRET' not in os.environ else 'seen')",
    "no environment of ours by /proc": (
        "import os\nseen = [each for each in os.listdir('/proc') if each.isdigit()"
        " and b'LIGHTNING_SECRET' in open(f'/proc/{each}/environ', 'rb').read()]\nprint(seen or 'held')"
    ),
    "no processes of the machine": (
        "import os; print('held' if sum(each.isdigit() for each in os.listdir('/proc')) <= 2 else os.listdir('/proc'))"
    ),
    "memory": "try: x = bytearray(2**30)\nexcept MemoryError: print('held')",
    "memory of segments that outlive a process": (
        "import ctypes; print('held' if ctypes.CDLL(None).shmget(0, 2**20, 0o1666) == -1 else 'made')"
    ),
    "memory of files without a place": "import os\ntry: os.memfd_create('x')\nexcept OSError: print('held')",
    "disk, one file": (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n    with open('/tmp/x', 'wb') as file:\n        for _ in range(64): file.write(bytes(2**20))\n"
        "except OSError: print('held')"
    ),
    "disk, many files": (
        "try:\n    for i in range(64): open(f'/tmp/{i}', 'wb').write(bytes(2**20))\nexcept OSError: print('held')"
    ),
    "disk, what is printed": (
        "import os, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nheld = 0\n"
        "for grow in (os.ftruncate, lambda fd, size: os.posix_fallocate(fd, 0, size)):\n"
        "    try: grow(1, 2**30)\n    except OSError: held += 1\n"
        "print('held' if held == 2 else held)"
    ),
    "message queues": (
        "import ctypes; libc = ctypes.CDLL(None)\nmade = 0\n"
        "while made < 99 and libc.mq_open(b'/q%d' % made, 0o102, 0o600, None) >= 0: made += 1\n"
        "print('held' if made < 50 else made)"
    ),
    "not spared when memory is short": (
        "import os\nfile = os.open('/proc/self/oom_score_adj', os.O_WRONLY)\n"
        "try: os.write(file, b'-1000')\nexcept OSError: print('held')"
    ),
    "not before others": "import os\ntry: os.setpriority(os.PRIO_PROCESS, 0, -10)\nexcept OSError: print('held')",
    "open files": "try:\n    files = [open('/dev/null') for _ in range(99)]\nexcept OSError: print('held')",
    "fork bomb": (
        "import os, time\nmade = 0\n"
        "try:\n    while made < 99:\n        if os.fork() == 0: time.sleep(60)\n        made += 1\n"
        "except OSError: print('held' if made < 5 else made)"
    ),
    "threads": (
        "import threading, time\nstarted = 0\n"
        "sleeping = lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True)\n"
        "try:\n    while started < 99: sleeping().start(); started += 1\n"
        "except RuntimeError: print('held' if started < 5 else started)"
    ),
    "no namespaces": (
        "import subprocess; print('held' if subprocess.run(['unshare', '-Ur', 'true'],"
        " stderr=subprocess.DEVNULL).returncode else 'made')"
    ),
    "no user above": "import os\ntry: os.setuid(0)\nexcept OSError: print('held')",
    "no limits raised": (
        "import resource as r\ntry: r.setrlimit(r.RLIMIT_AS, (-1, -1))\nexcept (OSError, ValueError): print('held')"
    ),
    "no debugger": "import ctypes; print('held' if ctypes.CDLL(None).ptrace(0, 0, 0, 0) == -1 else 'traced')",
}


@pytest.fixture(scope="module")
def sandbox():
    os.environ["LIGHTNING_SECRET"] = "secret"
    yield isolated()
    del os.environ["LIGHTNING_SECRET"]


@pytest.mark.parametrize("name", ATTEMPTS)
def test_the_sandbox_holds(sandbox, name):
    (execution,) = sandbox.run([Program(ATTEMPTS[name])])
    assert execution.stdout.endswith("held\n"), execution


def test_standard_input_and_output_are_those_of_the_program(sandbox):
    (execution,) = sandbox.run([Program("print(sum(map(int, input().split())))", "1 2 3\n")])
    assert (execution.status, execution.exit_code, execution.stdout) == ("ended", 0, "6\n")


def test_errors_are_the_programs(sandbox):
    (execution,) = sandbox.run([Program("raise ValueError('mine')")])
    assert (execution.status, execution.exit_code) == ("ended", 1)
    assert execution.stderr.endswith("ValueError: mine\n")


def test_computing_without_end_ends(sandbox):
    (execution,) = sandbox.run([Program("while True: pass")])
    assert execution.status == "time"


def test_sleeping_without_end_ends():
    isolated()
    with Sandbox(1, dataclasses.replace(LIMITS, wall_seconds=1)) as sandbox:
        begin = time.monotonic()
        (execution,) = sandbox.run([Program("import time; time.sleep(600)")])
    assert execution.status == "time"
    assert time.monotonic() - begin < 60


def test_printing_without_end_ends(sandbox):
    (execution,) = sandbox.run([Program("while True: print('x' * 10**6)")])
    assert len(execution.stdout) <= LIMITS.file
    assert execution.exit_code != 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives workers users of their own")
def test_what_is_left_behind_ends_with_its_execution(monkeypatch):
    isolated()
    monkeypatch.setattr("lightning_jax.rewards.sandbox.FIRST_UID", 51_000)  # nobody else's here
    with Sandbox(1, LIMITS) as sandbox:
        sandbox.run([Program("import os, time\nif os.fork() == 0: os.setsid(); time.sleep(12345)")])
    for _ in range(100):  # the kernel ends them a moment after
        users = subprocess.run(["ps", "-eo", "uid"], capture_output=True, text=True).stdout.split()
        if "51000" not in users:
            break
        time.sleep(0.1)
    assert "51000" not in users


def test_a_machine_without_room_for_processes_is_an_infra_error(sandbox, monkeypatch):
    def full(*_, **__):
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    files = len(os.listdir("/proc/self/fd"))
    (program,) = sandbox.run([Program("print(1)")])
    (tests,) = sandbox.test([FunctionTests("def f(x): return x", "f", "")])
    assert (program.status, tests.status) == ("infra_error", "infra_error")
    assert program.stderr == "Resource temporarily unavailable"
    assert len(os.listdir("/proc/self/fd")) == files


def test_workers_do_not_take_processes_from_each_other(sandbox):
    code = "import os, time\nfor _ in range(3):\n    if os.fork() == 0: time.sleep(0.2); os._exit(0)\nprint('made')"
    executions = sandbox.run([Program(code)] * 6)
    assert [each.stdout for each in executions] == ["made\n"] * 6


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "def f(x):\n    import os; os._exit(0)",
        "def f(x): raise SystemExit",
        "def f(x): raise KeyboardInterrupt",
        "class Always(int):\n    def __eq__(self, other): return True\ndef f(x): return Always()",
        "import sys\nprint('{\"passed\": true}', flush=True)\ndef f(x): return None",
        # All that is open, told that the tests have passed.
        'import os\nfor fd in range(32):\n    try: os.write(fd, b\'{"passed": true, "reason": ""}\\n\')\n'
        "    except OSError: pass",
        "def f(x): return [None] * 10**6",
        "def f(x):\n    y = []\n    for _ in range(10**4): y = [y]\n    return y",
        "def f(x): return 10 ** 10**5",
        "f = 2",
        "syntax error",
        "",
    ],
)
def test_no_trick_passes_unit_tests(sandbox, source):
    (execution,) = sandbox.test([FunctionTests(source, "f", "def check(candidate): assert candidate(1) == 2")])
    assert execution.status == "ended"
    assert '"passed": false' in execution.stdout


def test_the_code_under_test_cannot_read_its_tests(sandbox):
    source = (
        "import os\ndef f(x):\n    for each in os.listdir('/proc'):\n        if each.isdigit():\n"
        "            for name in ('cmdline', 'environ'):\n"
        "                if b'4711' in open(f'/proc/{each}/{name}', 'rb').read(): return 4711\n"
    )
    (execution,) = sandbox.test([FunctionTests(source, "f", "def check(candidate): assert candidate(1) == 4711")])
    assert '"passed": false' in execution.stdout


def test_values_cross_as_what_they_are(sandbox):
    test = (
        "values = [None, True, 1, 1.5, float('inf'), 1j, 'x', b'x', (1, (2,)), [1, [2]], {1, 2}, frozenset({1}),"
        " {(1, 2): {'a': [1]}}, 2**100]\n"
        "def check(candidate):\n"
        "    for value in values:\n"
        "        other = candidate(value)\n"
        "        assert other == value and type(other) is type(value), value\n"
        "    try: candidate(1, 2)\n"
        "    except TypeError: return\n"
        "    assert False"
    )
    (execution,) = sandbox.test([FunctionTests("def f(x): return x", "f", test)])
    assert '"passed": true' in execution.stdout, execution


def test_where_it_cannot_be_had_it_refuses_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"^no sandbox for generated code: bwrap is not installed; apt install bubblewrap"
    ):
        Sandbox(1)


def test_an_old_bubblewrap_is_refused(monkeypatch, tmp_path):
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho bubblewrap 0.6.1\n")
    old.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(old))
    with pytest.raises(UserError, match=r"bwrap is older than 0\.8"):
        Sandbox(1)


def test_an_old_kernel_is_refused(monkeypatch):
    isolated()
    monkeypatch.setattr("platform.release", lambda: "5.10.0-28-amd64")
    with pytest.raises(UserError, match=r"it needs Linux 5\.14"):
        Sandbox(1)


def test_told_unsafe_it_runs_without_bubblewrap(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with Sandbox(1, LIMITS, unsafe=True) as sandbox:
        assert sandbox.run([Program("import os; print(os.getcwd())")])[0].stdout.startswith("/tmp")
        (execution,) = sandbox.test([FunctionTests("def f(x): return x + 1", "f", "assert f(1) == 2")])
        assert '"passed": true' in execution.stdout
        assert sandbox.run([Program("while True: pass")])[0].status == "time"
