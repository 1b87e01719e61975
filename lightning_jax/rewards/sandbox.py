"""Runs code that nobody has read: no network, no files of this machine, limits on everything it can take.

bubblewrap gives each execution namespaces of its own; where it is missing, nothing runs unless told `unsafe`. What an
execution can take at most is `processes` times `memory` plus `disk`, and what the kernel keeps for files without
content: half a million of them can be made in 5 s, at about 1 KB each.
"""

import contextlib
import functools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, Self

from lightning_jax.errors import UserError
from lightning_jax.rewards.isolation import ENVIRONMENT, WAYS_OUT, bwrap_command, interpreter, require_isolation
from lightning_jax.rewards.system_calls import refusing_filter

INSIDE = Path(__file__).with_name("sandbox_process.py").read_text(encoding="utf-8")
FIRST_UID = 50_000  # two for each worker; no user of a usual machine has one of them
Status = Literal["ended", "time", "infra_error"]
START = 60.0  # seconds until a process is ready, on a machine that does other work too


@dataclass(frozen=True)
class Limits:
    """Of one execution.

    Attributes:
        cpu_seconds: of computing, of each process.
        wall_seconds: from when it is ready; more than `cpu_seconds`, since the machine does other work too.
        memory: bytes of address space of each process.
        processes: at the same time, threads included.
        files: open ones of each process.
        file: bytes of the largest file, and of what is printed.
        disk: bytes of all files, which are in memory.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 30.0
    memory: int = 512 * 2**20
    processes: int = 2
    files: int = 32
    file: int = 8 * 2**20
    disk: int = 32 * 2**20


@dataclass(frozen=True)
class Execution:
    """What came of a program.

    Attributes:
        status: "ended", also by an error of its own; "time" where a limit of time ended it; "infra_error" where the
            sandbox failed and nothing is known of the program.
        exit_code: minus the signal's number where one ended it.
        stdout, stderr: what it printed; of an infra_error, `stderr` is the reason.
    """

    status: Status
    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Program:
    """Python code that reads `stdin` and prints."""

    source: str
    stdin: str = ""


@dataclass(frozen=True)
class FunctionTests:
    """Unit tests of a function.

    Attributes:
        source: the code under test.
        name: of the function.
        test: defines `check(candidate)`, or asserts things of the function by its name.
        setup: what the tests use besides: the code of the prompt, for instance.
    """

    source: str
    name: str
    test: str
    setup: str = ""


class Sandbox:
    """Workers that execute code, which end with `close` or the `with` block.

    Args:
        workers: executions at the same time.
        unsafe: runs without isolation, with limits of time, memory and files only.

    Raises:
        UserError: this machine cannot isolate code.
    """

    def __init__(self, workers: int = 2, limits: Limits | None = None, *, unsafe: bool = False):
        self.limits, self.unsafe = limits or Limits(), unsafe
        if not unsafe:
            require_isolation()
        self._threads = ThreadPoolExecutor(workers)
        self._uids: queue.SimpleQueue[int] = queue.SimpleQueue()
        for worker in range(workers):
            self._uids.put(FIRST_UID + 2 * worker)
        (trial,) = self.run([Program("print(6 * 7)")])
        if trial.stdout != "42\n":
            self.close()
            raise UserError(f"no sandbox for generated code: {trial.stderr or trial.status}; {WAYS_OUT}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._threads.shutdown()

    def run(self, programs: Sequence[Program]) -> list[Execution]:
        """Each program's execution; one that is an infra_error can be tried again."""
        return list(self._threads.map(functools.partial(self._execute, self._run_program), programs))

    def test(self, functions: Sequence[FunctionTests]) -> list[Execution]:
        """The execution of each function's tests: `stdout` is {"passed": ..., "reason": ...} where they ended."""
        return list(self._threads.map(functools.partial(self._execute, self._test_function), functions))

    def _execute(self, function: Callable[..., Execution], given: Program | FunctionTests) -> Execution:
        uid = self._uids.get()
        try:
            with contextlib.ExitStack() as stack:
                return function(given, uid, stack)
        except OSError as error:  # no more processes or files on this machine
            return Execution("infra_error", 0, "", str(error))
        finally:
            self._uids.put(uid)

    def _run_program(self, program: Program, uid: int, stack: contextlib.ExitStack) -> Execution:
        stdin, stdout, stderr = (stack.enter_context(_memory_file()) for _ in range(3))
        stdin.write(program.stdin.encode("utf-8", "replace"))
        stdin.seek(0)
        job = {"role": "program", "source": program.source}
        process = stack.enter_context(_Process(self, uid, job, stdin, stdout, stderr))
        return _execution(process, self.limits.wall_seconds, stdout, stderr)

    def _test_function(self, tests: FunctionTests, uid: int, stack: contextlib.ExitStack) -> Execution:
        nothing, verdict, stderr = (stack.enter_context(_memory_file()) for _ in range(3))
        (to_function, calls), (from_function, results) = (_pipe(stack) for _ in range(2))
        job = {"role": "function", "source": tests.source, "name": tests.name}
        function = stack.enter_context(_Process(self, uid, job, to_function, results, nothing))
        job = {"role": "tests", "source": tests.setup, "name": tests.name, "test": tests.test}
        process = stack.enter_context(_Process(self, uid + 1, job, from_function, verdict, stderr, calls))
        for end in (to_function, calls, from_function, results):
            end.close()  # each side has its own, and sees when the other ends
        if not function.wait_until_ready():
            return Execution("infra_error", 0, "", _text(nothing))
        execution = _execution(process, self.limits.wall_seconds, verdict, stderr)
        function.wait(0)
        if function.exit_code == -signal.SIGXCPU:  # the tests only see that it ended
            return replace(execution, status="time", exit_code=function.exit_code)
        return execution


class _Process:
    """A process in a sandbox of its own, or without one; it ends with the `with` block."""

    exit_code: int | None = None

    def __init__(
        self, sandbox: Sandbox, uid: int, job: Mapping[str, Any], stdin: IO, stdout: IO, stderr: IO, *more: IO
    ):
        self._stack = contextlib.ExitStack()
        self._isolated, limits = not sandbox.unsafe, sandbox.limits
        self._ready, ready = os.pipe()
        self._stack.callback(os.close, self._ready)
        job_file = self._stack.enter_context(_memory_file())
        resources = {
            "RLIMIT_CPU": (limits.cpu_seconds, limits.cpu_seconds + 1),  # a signal at one, the end at the other
            "RLIMIT_AS": (limits.memory,) * 2,
            "RLIMIT_NOFILE": (limits.files,) * 2,
            "RLIMIT_FSIZE": (limits.file,) * 2,
            "RLIMIT_CORE": (0, 0),
        }
        fds = [ready, job_file.fileno(), *(each.fileno() for each in more)]
        python, command = interpreter() or Path(sys.executable), list[str]()
        options: dict[str, Any] = {}
        if self._isolated:
            # Of the processes one is bubblewrap's. Outside a namespace all of the user's would count.
            resources["RLIMIT_NPROC"] = (limits.processes + 1,) * 2
            seccomp = self._stack.enter_context(_memory_file(refusing_filter()))
            fds.append(seccomp.fileno())
            command = bwrap_command(python, limits.disk, seccomp.fileno())
            if os.getuid() == 0:
                options = {"user": uid, "group": uid, "extra_groups": []}
        else:
            options = {"cwd": self._stack.enter_context(tempfile.TemporaryDirectory())}
        job = {**job, "limits": resources, "ready_fd": ready, "calls_fd": fds[2] if more else None}
        job_file.write(json.dumps(job).encode())
        job_file.seek(0)
        try:
            self._process = subprocess.Popen(
                [*command, str(python), "-I", "-S", "-c", INSIDE, str(job_file.fileno())],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=fds,
                env=ENVIRONMENT,
                start_new_session=True,
                **options,
            )
        except OSError:
            self._stack.close()
            raise
        finally:
            os.close(ready)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # what is left; nobody has waited, so the number is still its own
        self._process.wait()
        self._stack.close()

    def wait_until_ready(self) -> bool:
        """Whether it came as far as to run what it was given."""
        return _readable(self._ready, START) and bool(os.read(self._ready, 1))

    def wait(self, seconds: float) -> None:
        """Sets `exit_code` where it ends in time."""
        pid_fd = os.pidfd_open(self._process.pid)
        try:
            if _readable(pid_fd, seconds):
                ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
                assert ended is not None
                code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                # bubblewrap ends with 128 and the number of the signal that ended what it ran.
                self.exit_code = 128 - code if self._isolated and code > 128 else code
        finally:
            os.close(pid_fd)

    @property
    def out_of_time(self) -> bool:
        return self.exit_code in (None, -signal.SIGXCPU)


def _execution(process: _Process, seconds: float, stdout: IO[bytes], stderr: IO[bytes]) -> Execution:
    ready = process.wait_until_ready()
    process.wait(seconds if ready else 0)
    status: Status = "infra_error" if not ready else "time" if process.out_of_time else "ended"
    return Execution(status, process.exit_code or 0, _text(stdout), _text(stderr))


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _memory_file(content: bytes = b"") -> IO[bytes]:
    """A file in memory. The limit of the largest file holds for it too, so nobody has to read while it is written."""
    file = os.fdopen(os.memfd_create("sandbox"), "w+b", buffering=0)
    file.write(content)
    file.seek(0)
    return file


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return stack.enter_context(os.fdopen(read, "rb", 0)), stack.enter_context(os.fdopen(write, "wb", 0))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace").strip("\0")
