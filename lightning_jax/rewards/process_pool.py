"""Processes that share a list of requests; one that loops or crashes is killed and replaced.

Libraries that stop themselves by a signal do so in the main thread only, and not in the middle of a long computation
of C. A limit of CPU time that the kernel enforces stops all, and does not depend on what else the machine does.
"""

import queue
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning_jax.json_process import JSONProcess, ProcessEnded, ProcessTimeout

PATIENCE = 10.0  # wall-clock time for each second of CPU time, on a machine that does other work too
START = 60.0  # seconds for imports
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


class RequestFault(Exception):
    """The request took more CPU time than it may, or crashed what worked on it."""


class ProcessPool:
    """Processes of one script, as math_process.py is one.

    Args:
        script: what each process runs; its first argument is `cpu_seconds`.
        processes: at the same time; each starts when there is a request for it.
        cpu_seconds: a request's limit.
    """

    def __init__(self, script: Path, processes: int, cpu_seconds: int):
        self._script, self._cpu_seconds = script, cpu_seconds
        self._threads = ThreadPoolExecutor(processes)
        self._idle: queue.SimpleQueue[JSONProcess | None] = queue.SimpleQueue()
        for _ in range(processes):
            self._idle.put(None)
        self._processes = processes

    def map(self, requests: Sequence[Any]) -> list[Any]:
        """The answer to each request, or the exception: RequestFault, or what went wrong without its fault
        (ProcessTimeout, ProcessEnded)."""
        return list(self._threads.map(self._ask, requests))

    def close(self) -> None:
        """Ends all processes; call it when no `map` is under way."""
        self._threads.shutdown()
        for _ in range(self._processes):
            if process := self._idle.get():
                process.close()

    def _ask(self, request: Any) -> Any:
        process = self._idle.get()
        try:
            process = process or JSONProcess(self._script, str(self._cpu_seconds))
            return process.ask(request, START + PATIENCE * self._cpu_seconds)
        except (ProcessTimeout, ProcessEnded, OSError) as error:
            if process:
                process.close()
                process = None
            ended_by = -error.exit_code if isinstance(error, ProcessEnded) else None
            if ended_by == signal.SIGXCPU:
                return RequestFault(f"more than {self._cpu_seconds} s of computing")
            # The kernel kills (SIGKILL) whom it likes when memory is short; a crash is the request's own doing.
            return RequestFault(signal.Signals(ended_by).name) if ended_by in CRASHES else error
        finally:
            self._idle.put(process)
