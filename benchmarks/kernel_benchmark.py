"""The steps of `kernels.py`, each of which asks the processes that compute and puts their answers on record."""

import collections
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
ONLY_BF16 = ("pallas_gpu",)
LONGEST_SOFTMAX = 131_072
SLOWEST_ANSWER = 100  # seconds, compilation included; then the process is given up
MOST_LOSSES = 2  # of processes; then the implementation is given up
LONGEST_SEARCH = 120  # seconds
COMPARED = Case(1, 2, 128, 96)  # of which every implementation of one function must give one result
SEARCH_FOR_RACES = ["-m", "pytest", "-q", "-k", "race", "-p", "no:cacheprovider", "tests/pallas_kernels"]


class Worker:
    """A side that is started anew after it ended or did not answer."""

    def __init__(self, python: str, function: Callable[[int], Answers], environment: dict[str, str]):
        self._start = partial(Side, python, function, os.cpu_count(), environment)
        self._side: Side | None = None
        self.versions: dict[str, str] = {}

    def ask(self, limit: float, **question: Any) -> dict[str, Any]:
        """{"answer": ...}, or {"error": a line that says why there is none, "usable": whether the process lives on}."""
        try:
            if self._side is None:
                self._side = self._start()
                self.versions = self._side.versions
            reply = self._side.ask(limit, **question)
        except (RuntimeError, OSError) as error:  # a TimeoutError is an OSError
            reply = {"error": str(error), "usable": False}
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
        self._losses = collections.Counter()  # of processes, by implementation
        self.record: dict[str, Any] = {
            "device": {"platform": "none", "kind": "none", "dtype": "none", "implementations": []},
            "rates": None,
            **{name: [] for name in ("numerics", "same_function", "same_bits", "races", "times", "tpu", "gpu")},
            **{name: [] for name in ("failures", "left_out", "missing")},
        }

    def remaining(self) -> float:
        return self._deadline - time.monotonic()

    def versions(self) -> dict[str, dict[str, str]]:
        sides = {"jax": self._ours, "torch": self._theirs, "compilers": self._compilers}
        return {name: side.versions for name, side in sides.items() if side.versions}

    def begin(self, torch: bool) -> None:
        """Which device there is, who runs on it, and what rates it reaches."""
        device = self._ask(self._ours, do="device")
        if device is None:
            return
        self.record["device"] = device
        self._sides = dict.fromkeys(device["implementations"], self._ours)
        beside = self._ask(self._theirs, do="device") if torch else None
        if beside:
            self._sides |= dict.fromkeys(beside["implementations"], self._theirs)
        if device["platform"] != "cpu":  # whose caches and chunks are not those of the floors
            self.record["rates"] = self._ask(self._ours, do="rates")

    def check(self, case: Case, dtype: str) -> None:
        for name in self._lightning_of_ours():
            if name in ONLY_BF16 and dtype != "bfloat16":
                continue
            errors = self._ask(self._ours, do="numerics", implementation=name, case=case, dtype=dtype)
            if errors:
                self.record["numerics"].append(
                    {"implementation": name, "case": case._asdict(), "dtype": dtype, "errors": errors}
                )

    def compare(self) -> None:
        """Whether all implementations of lightning attention give one result, and all of softmax attention."""
        outputs = {
            name: self._ask(side, do="output", implementation=name, case=COMPARED) for name, side in self._sides.items()
        }
        for softmax in (False, True):
            known = {name: np.array(o) for name, o in outputs.items() if o and (name in SOFTMAX) == softmax}
            for name, o in list(known.items())[1:]:
                first = next(iter(known.values()))
                error = float(np.linalg.norm(o - first) / np.linalg.norm(first))
                self.record["same_function"].append(
                    {"implementation": name, "beside": next(iter(known)), "error": error}
                )

    def repeat(self, case: Case) -> None:
        for name in self._lightning_of_ours():
            same = self._ask(self._ours, do="repeat", implementation=name, case=case)
            if same is not None:
                self.record["same_bits"].append({"implementation": name, "case": case._asdict(), "same": same})

    def search_for_races(self) -> None:
        """By the tests, in the interpreter of each backend; their last line is the result."""
        command = ["nice", sys.executable, *SEARCH_FOR_RACES]
        try:
            done = subprocess.run(
                command,
                cwd=Path(__file__).parents[1],
                env=os.environ | ON_THE_CPU,
                timeout=min(LONGEST_SEARCH, self.remaining()),
                capture_output=True,
                text=True,
            )
            self.record["races"].append(done.stdout.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            self.record["left_out"].append("the search for races, which was cut")

    def time(self, case: Case) -> None:
        sides = {name: side for name, side in self._sides.items() if takes(name, case)}
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
            row = self._ask(self._compilers, do="tpu", generation=generation, dim=dim, direction=direction)
            self.record["tpu"] += [row] if row else []

    def compile_for_gpu(self, case: Case) -> None:
        kernels = self._ask(self._compilers, do="gpu", case=case)
        self.record["gpu"] += [{"case": case._asdict()} | kernel for kernel in kernels or ()]

    def _ask(self, side: Worker, **question: Any) -> Any:
        """The answer; without one, None and a failure on record."""
        if self._losses[question.get("implementation")] >= MOST_LOSSES:
            return None
        reply = side.ask(max(1.0, min(SLOWEST_ANSWER, self.remaining())), **question)
        if "error" in reply:
            self._losses[question.get("implementation")] += not reply["usable"]
            asked = " ".join(str(tuple(each) if isinstance(each, Case) else each) for each in question.values())
            self.record["failures"].append(f"{asked}: {reply['error']}")
            print(self.record["failures"][-1], flush=True)
        return reply.get("answer")

    def _lightning_of_ours(self) -> list[str]:
        return [name for name, side in self._sides.items() if side is self._ours and name not in SOFTMAX]

    def _floor(self, case: Case, direction: str) -> float | None:
        rates = self.record["rates"]
        itemsize = {"float32": 4, "bfloat16": 2}[self.record["device"]["dtype"]]
        return floor(case, direction, itemsize, Rates(**rates)) if rates else None


def takes(implementation: str, case: Case) -> bool:
    """Documents are timed with ours only, softmax attention up to a length that it finishes in time."""
    if implementation in SOFTMAX:
        return case.length <= LONGEST_SOFTMAX and case.documents == 1
    return case.documents == 1 or not implementation.startswith("fla")
