"""Libraries measured beside each other: each in a process of its own, whose interpreter has it, and they take turns.

A benchmark has a function for each side, which imports that side's library and returns its versions and a function that
answers questions; questions and answers are what JSON holds. A side's process stays alive, so that it compiles and
warms up before a clock starts, and sleeps while another side runs. On a CPU all of them get huge pages for large arrays
(GLIBC_TUNABLES): XLA maps and unmaps a step's memory each time, and half a million page faults would be part of it.
"""

import importlib
import inspect
import json
import os
import select
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

Answers = tuple[dict[str, str], Callable[..., Any]]  # versions by package; from a question's fields to its answer
ON_THE_CPU = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Side:
    """The process that runs a side's function; closed at the end of a `with` block."""

    def __init__(
        self,
        python: str,
        function: Callable[[int], Answers],
        threads: int,
        environment: Mapping[str, str] = ON_THE_CPU,
    ):
        """Starts it and waits until its library is imported.

        Args:
          python: the interpreter that has the library.
          function: of a program of this folder; is called with `threads`.
          threads: CPU cores that the process may use.
          environment: variables besides this process's own.
        """
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [python, __file__, Path(inspect.getfile(function)).stem, function.__name__, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        )
        self.versions: dict[str, str] = self._answer()

    def ask(self, limit: float | None = None, /, **question: Any) -> Any:
        """The answer to a question's fields.

        Raises:
          RuntimeError: the process ended.
          TimeoutError: no answer came within `limit` seconds; the process can only be killed.
        """
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer(limit)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self, limit: float | None = None) -> Any:
        if not select.select([self._process.stdout], [], [], limit)[0]:
            raise TimeoutError(f"no answer within {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._process.args)} ended; its error is above")
        return json.loads(line)


def take_turns(measurements: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each measurement once per round, every second round in reverse: what drifts meets all of them alike."""
    figures: dict[str, list[float]] = {name: [] for name in measurements}
    for number in range(rounds):
        for name in measurements if number % 2 == 0 else reversed(measurements):
            figures[name].append(measurements[name]())
    return figures


def ratios(dividends: Sequence[float], divisors: Sequence[float]) -> tuple[float, float, float]:
    """Least, median and most of the rounds' ratios."""
    each = [dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True)]
    return min(each), statistics.median(each), max(each)


def work(module: str, function: str, threads: int) -> None:
    """The life of a side's process: versions first, then an answer for each line."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not be taken for an answer
    if hasattr(os, "sched_setaffinity"):  # Linux; before a library counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    sys.modules["kernels"] = None  # transformers looks for a package so named, and must not find our program
    versions, answer = getattr(importlib.import_module(module), function)(threads)
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
