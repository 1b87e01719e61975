"""Arithmetic word problems with worked answers, generated: a task whose answers anybody can verify, for any size.

A problem is a chat: the question, and an answer that ends in "#### " and the number, as GSM8K's do. A preference has
such an answer and one with the same reasoning and a wrong number. The same arguments give the same problems, each of
them once.

Source: the form of the answers is that of GSM8K (arXiv 2110.14168).
"""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

NUM_PROBLEMS = 12_000
VERSION = 1  # of what is generated, part of the fingerprint
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "June")
_THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "tickets")


class Problem(NamedTuple):
    """A question and the calculation that answers it."""

    question: str
    calculation: str
    answer: int

    @property
    def solution(self) -> str:
        return self.worked(self.answer)

    def worked(self, answer: int) -> str:
        """The solution with this answer in place of the right one."""
        return f"{self.calculation} = {answer}\n#### {answer}"


def _buying(a: int, b: int, who: str, what: str) -> Problem:
    question = f"{who} has {a} {what} and buys {b} more. How many {what} does {who} have?"
    return Problem(question, f"{a} + {b}", a + b)


def _giving(a: int, b: int, who: str, what: str) -> Problem:
    most, least = max(a, b), min(a, b)
    question = f"{who} has {most} {what} and gives {least} away. How many {what} are left?"
    return Problem(question, f"{most} - {least}", most - least)


def _packing(a: int, b: int, who: str, what: str) -> Problem:
    a, b = a % 9 + 1, b % 9 + 1
    question = f"{who} fills {a} boxes with {b} {what} each. How many {what} is that?"
    return Problem(question, f"{a} * {b}", a * b)


_KINDS: tuple[Callable[[int, int, str, str], Problem], ...] = (_buying, _giving, _packing)


def problems(count: int, seed: int = 0) -> Iterator[Problem]:
    """`count` different problems with numbers below 20."""
    noise, seen = random.Random(seed), set()
    while len(seen) < count:
        kind = noise.choice(_KINDS)
        problem = kind(noise.randrange(1, 20), noise.randrange(1, 20), noise.choice(_NAMES), noise.choice(_THINGS))
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def conversations(count: int = NUM_PROBLEMS, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of problems and their solutions, with the answer as `ground_truth`."""
    for problem in problems(count, seed):
        yield {"messages": _chat(problem.question, problem.solution), "ground_truth": str(problem.answer)}


def preferences(count: int = NUM_PROBLEMS, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of problems with a right and a wrong solution; the wrong answer is off by 1, 2, 3 or 10."""
    noise = random.Random(seed + 1)
    for problem in problems(count, seed):
        wrong = problem.answer + noise.choice((-3, -2, -1, 1, 2, 3, 10))
        yield {
            "chosen": _chat(problem.question, problem.solution),
            "rejected": _chat(problem.question, problem.worked(wrong)),
        }


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
