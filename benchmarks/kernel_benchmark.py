"""The steps of `kernels.py`, each of which asks the processes that compute and puts their answers on record."""

import collections
import concurrent.futures
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from kernel_roofline import SOFTMAX, Case, Rates, floor
from sides import ON_THE_CPU, Answers, Side, take_turns

ROUNDS, ROUNDS_OF_LONG_ROWS = 5, 3
LONG_ROW = 65_536
LONGEST_SOFTMAX = 131_072
# flash-linear-attention tries some hundred variants of its kernels for each number of heads and dims: minutes.
TUNED = [Case(1, heads, 128, 8192) for heads in (64, 16)]
SLOWEST_ANSWER = 80  # seconds, compilation included; then the process is given up
LONGEST_TUNING = 200
LONGEST_SEARCH = 150
LONGEST_COMPILATION = 600
GIVEN_UP = 6  # failures of an implementation, of which one without an answer, which takes longest, counts as three
COMPARED = Case(1, 64, 128, 96)  # of which every implementation of one function must give one result
SEARCH_FOR_RACES = [
    *("-m", "pytest", "-q", "-k", "races", "-p", "no:cacheprovider", "tests/pallas_kernels"),
    *("-o", "addopts="),  # those of pyproject.toml are of a plugin, too, that this machine may not have
]


class Worker:
    """A side that is started anew after it ended or did not answer."""

    def __init__(self, python: str, function: Callable[[int], Answers], environment: dict[str, str]):
        self._start = partial(Side, python, function, os.cpu_count(), environment)
        self._side: Side | None = None
        self.versions: dict[str, str] = {}

    def ask(self, limit: float, **question: Any) -> dict[str, Any]:
        """{"answer": ...}, or {"error": a line that says why there is none, "usable": whether the process lives on}.

        Where not even an error was answered, "answered" is False.
        """
        try:
            if self._side is None:
                self._side = self._start()
                self.versions = self._side.versions
            reply = self._side.ask(limit, **question)
        except (RuntimeError, OSError) as error:  # a TimeoutError is an OSError
            reply = {"error": str(error), "usable": False, "answered": False}
        if not reply.get("usable", True):
            self._kill()
        return reply

    def _kill(self) -> None:
        if self._side is not None:
            self._side.kill()
            self._side = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()


class Benchmark:
    """Fills its `record` step by step."""

    def __init__(self, ours: Worker, theirs: Worker, compilers: Worker, deadline: float):
        self._ours, self._theirs, self._compilers, self._deadline = ours, theirs, compilers, deadline
        self._sides: dict[str, Worker] = {}  # by implementation
        self._failures = collections.Counter()  # by implementation
        self._tuned: set[tuple[str, int, int]] = set()  # implementation, heads, dim
        self._threads = concurrent.futures.ThreadPoolExecutor()
        self._meanwhile: list[concurrent.futures.Future] = []
        self.record: dict[str, Any] = {
            "device": dict.fromkeys(("platform", "kind", "dtype", "auto"), "none") | {"implementations": []},
            "rates": None,
            **{name: [] for name in ("numerics", "same_function", "same_bits", "races", "times", "tpu", "gpu")},
            **{name: [] for name in ("failures", "left_out", "missing")},
        }

    def remaining(self) -> float:
        return self._deadline - time.monotonic()

    def versions(self) -> dict[str, dict[str, str]]:
        sides = {"jax": self._ours, "torch": self._theirs, "compilers": self._compilers}
        return {name: side.versions for name, side in sides.items() if side.versions}

    def lightning_of_ours(self) -> list[str]:
        return [name for name, side in self._sides.items() if side is self._ours and name not in SOFTMAX]

    def begin(self, torch: bool) -> None:
        """Which device there is, who runs on it, and what rates it reaches."""
        device = self._ask(self._ours, do="device")
        if device is None:
            return
        self.record["device"] = device
        self._sides = dict.fromkeys(device["implementations"], self._ours)
        if device["platform"] == "cpu":  # whose caches and chunks are not those of the floors, and nobody waits for it
            self._deadline = math.inf
        else:
            self.record["rates"] = self._ask(self._ours, do="rates")
        # What takes minutes and is not timed goes on beside the checks.
        self._meanwhile = [self._threads.submit(self._search_for_races)]
        if torch:
            self._meanwhile.append(self._threads.submit(self._tune))

    def meet(self) -> None:
        """Waits for what `begin` has started, so that it disturbs no time."""
        for each in self._meanwhile:
            each.result()

    def _tune(self) -> None:
        beside = self._ask(self._theirs, do="device") or {"implementations": []}
        for case in TUNED:
            for name in filter(tunes_itself, beside["implementations"]):
                question = {"do": "time", "implementation": name, "direction": "training", "case": case}
                if self._ask(self._theirs, LONGEST_TUNING, **question) is not None:
                    self._tuned.add((name, case.heads, case.dim))
        self._sides |= dict.fromkeys(beside["implementations"], self._theirs)

    def _search_for_races(self) -> None:
        """By the tests, in the interpreter of each backend; their last line is the result."""
        try:
            done = subprocess.run(
                ["nice", sys.executable, *SEARCH_FOR_RACES],
                cwd=Path(__file__).parents[1],
                env=os.environ | ON_THE_CPU,
                timeout=max(0, min(LONGEST_SEARCH, self.remaining())),
                capture_output=True,
                text=True,
            )
            found = done.stdout.strip().splitlines()
            if found:
                self.record["races"].append(found[-1])
            else:
                self.record["failures"].append(f"the search for races: {done.stderr.strip().splitlines()[-1]}")
        except subprocess.TimeoutExpired:
            self.record["left_out"].append("the search for races, which took too long")

    def check(self, name: str, case: Case, dtype: str) -> None:
        errors = self._ask(self._ours, do="numerics", implementation=name, case=case, dtype=dtype)
        if errors:
            found = {"implementation": name, "case": case._asdict(), "dtype": dtype, "errors": errors}
            self.record["numerics"].append(found)

    def repeat(self, name: str, case: Case) -> None:
        same = self._ask(self._ours, do="repeat", implementation=name, case=case)
        if same is not None:
            self.record["same_bits"].append({"implementation": name, "case": case._asdict(), "same": same})

    def compare(self) -> None:
        """Whether all implementations of lightning attention give one result, and all of softmax attention."""
        outputs = {
            name: self._ask(side, do="output", implementation=name, case=COMPARED) for name, side in self._sides.items()
        }
        for softmax in (False, True):
            known = [(name, np.array(o)) for name, o in outputs.items() if o and (name in SOFTMAX) == softmax]
            for name, o in known[1:]:
                beside, first = known[0]
                error = float(np.linalg.norm(o - first) / np.linalg.norm(first))
                self.record["same_function"].append({"implementation": name, "beside": beside, "error": error})

    def time(self, case: Case) -> None:
        sides = {name: side for name, side in self._sides.items() if self._takes(name, case)}
        for direction in ("forward", "training"):
            questions = {
                name: partial(self._ask, side, do="time", implementation=name, direction=direction, case=case)
                for name, side in sides.items()
            }
            works = {name: ask for name, ask in questions.items() if ask() is not None}  # compiled and warmed up
            seconds = take_turns(works, ROUNDS_OF_LONG_ROWS if case.length >= LONG_ROW else ROUNDS)
            self.record["times"].append(
                {
                    "case": case._asdict(),
                    "direction": direction,
                    "floor": self._floor(case, direction),
                    "seconds": {name: figures for name, figures in seconds.items() if None not in figures},
                }
            )

    def compile_for_tpu(self, generation: str, dim: int) -> None:
        for direction in ("forward", "backward"):
            question = {"do": "tpu", "generation": generation, "dim": dim, "direction": direction}
            row = self._ask(self._compilers, LONGEST_COMPILATION, **question)
            self.record["tpu"] += [row] if row else []

    def compile_for_gpu(self, case: Case) -> None:
        kernels = self._ask(self._compilers, LONGEST_COMPILATION, do="gpu", case=case)
        self.record["gpu"] += [{"case": case._asdict()} | kernel for kernel in kernels or ()]

    def _ask(self, side: Worker, limit: float = SLOWEST_ANSWER, /, **question: Any) -> Any:
        """The answer; without one, None and a failure on record."""
        implementation = question.get("implementation")
        if self._failures[implementation] >= GIVEN_UP:
            return None
        reply = side.ask(max(1.0, min(limit, self.remaining())), **question)
        if "error" in reply:
            if not reply["usable"]:
                self._failures[implementation] += 1 if reply.get("answered", True) else 3
            asked = " ".join(str(tuple(each) if isinstance(each, Case) else each) for each in question.values())
            self.record["failures"].append(f"{asked}: {reply['error']}")
            print(self.record["failures"][-1], flush=True)
        return reply.get("answer")

    def _floor(self, case: Case, direction: str) -> float | None:
        rates = self.record["rates"]
        itemsize = {"float32": 4, "bfloat16": 2}[self.record["device"]["dtype"]]
        return floor(case, direction, itemsize, Rates(**rates)) if rates else None

    def _takes(self, implementation: str, case: Case) -> bool:
        """Documents are timed with ours only, softmax attention up to a length that it finishes in time."""
        if implementation in SOFTMAX:
            return case.length <= LONGEST_SOFTMAX and case.documents == 1
        if tunes_itself(implementation):
            return (implementation, case.heads, case.dim) in self._tuned and case.documents == 1
        return True


def tunes_itself(implementation: str) -> bool:
    return implementation.startswith("fla")
