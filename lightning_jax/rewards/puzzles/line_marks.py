"""Grids whose marks look at rows and columns: kakurasu, nonogram, binairo."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_jax.rewards.puzzles.core import (
    MARKED_GRID,
    Cell,
    Made,
    hide,
    lines_of,
    marks_possible,
    matches_given,
    read_marks,
    show_marks,
    solutions,
    unique_clues,
)


def make_kakurasu(rng: random.Random, size: int) -> Made:
    lines = lines_of(size, size)
    truth = [rng.randint(0, 1) for _ in range(size**2)]
    sums = [sum(place * truth[cell] for place, cell in enumerate(line, 1)) for line in lines]

    def check(values: list, cell: Cell) -> bool:
        for line, total in zip(lines, sums, strict=True):
            if cell in line:
                marked = sum(place for place, each in enumerate(line, 1) if values[each])
                free = sum(place for place, each in enumerate(line, 1) if values[each] is None)
                if not marked <= total <= marked + free:
                    return False
        return True

    given = unique_clues(truth, [(0, 1)] * size**2, check=check, rng=rng)
    question = (
        "Mark cells so that the sums are right: a marked cell counts its column's number (1 for the first) in "
        f"its row, and its row's number in its column. Sums of the rows: {sums[:size]}; of the columns: "
        f"{sums[size:]}.\n\n"
        f"{show_marks(hide(truth, given), size)}"
    )
    return question, MARKED_GRID, {"sums": sums, "given": hide(truth, given), "size": size}, show_marks(truth, size)


def check_kakurasu(data: Mapping[str, Any], answer: str) -> bool:
    values = read_marks(answer, data["size"])
    lines = lines_of(data["size"], data["size"])
    sums = [sum(place * values[cell] for place, cell in enumerate(line, 1)) for line in lines]
    return sums == data["sums"] and matches_given(values, data["given"])


def _runs(values: Sequence[int]) -> list[int]:
    return [len(list(group)) for value, group in itertools.groupby(values) if value]


def make_nonogram(rng: random.Random, size: int) -> Made:
    lines = lines_of(size, size)
    truth = [int(rng.random() < 0.6) for _ in range(size**2)]
    runs = [_runs([truth[cell] for cell in line]) for line in lines]

    def check(values: list, cell: Cell) -> bool:
        for line, wanted in zip(lines, runs, strict=True):
            if cell in line:
                marks = [values[each] for each in line]
                if (None not in marks and _runs(marks) != wanted) or not marks_possible(values, line, sum(wanted)):
                    return False
        return True

    given = unique_clues(truth, [(0, 1)] * size**2, check=check, rng=rng)
    question = (
        "Solve this nonogram: the numbers of a line are the lengths of its blocks of marked cells, in order, "
        f"with at least one other cell between blocks. Rows: {runs[:size]}; columns: "
        f"{runs[size:]}.\n\n{show_marks(hide(truth, given), size)}"
    )
    return question, MARKED_GRID, {"runs": runs, "given": hide(truth, given), "size": size}, show_marks(truth, size)


def check_nonogram(data: Mapping[str, Any], answer: str) -> bool:
    values = read_marks(answer, data["size"])
    runs = [_runs([values[cell] for cell in line]) for line in lines_of(data["size"], data["size"])]
    return runs == data["runs"] and matches_given(values, data["given"])


def _balanced(marks: Sequence[int | None]) -> bool:
    """Whether a line of binairo can be right: no three alike in a row, not more than half of one kind."""
    threes = (marks[i : i + 3] for i in range(len(marks) - 2))
    half = len(marks) // 2
    return all(list(each) not in ([0, 0, 0], [1, 1, 1]) for each in threes) and all(
        list(marks).count(kind) <= half for kind in (0, 1)
    )


def make_binairo(rng: random.Random, size: int, clues: int) -> Made:
    lines, domains = lines_of(size, size), [(0, 1)] * size**2

    def check(values: list, cell: Cell) -> bool:
        return all(_balanced([values[each] for each in line]) for line in lines if cell in line)

    truth = next(solutions(domains, check=check, rng=rng))
    given = unique_clues(truth, domains, check=check, rng=rng, given=rng.sample(range(size**2), clues))
    question = (
        f"Fill this grid so that each row and each column has {size // 2} marked cells, and never three marked or "
        f"three other cells side by side.\n\n{show_marks(hide(truth, given), size)}"
    )
    return question, MARKED_GRID, {"given": hide(truth, given), "size": size}, show_marks(truth, size)


def check_binairo(data: Mapping[str, Any], answer: str) -> bool:
    values = read_marks(answer, data["size"])
    lines = lines_of(data["size"], data["size"])
    return matches_given(values, data["given"]) and all(_balanced([values[cell] for cell in line]) for line in lines)
