"""Squares with each number once in every row and column: sudoku, futoshiki, skyscrapers, calcudoku."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_jax.rewards.puzzles.core import (
    Cell,
    Made,
    hide,
    lines_of,
    matches_given,
    neighbours,
    read_integer_grid,
    show,
    solutions,
    unique_clues,
)

FORM = "the full grid, one line for each row, numbers separated by spaces"


def _latin(size: int, rng: random.Random, boxes: Sequence[Sequence[Cell]] = ()) -> list[int]:
    return next(solutions([range(1, size + 1)] * size**2, [*lines_of(size, size), *boxes], rng=rng))


def _is_latin(values: Sequence[int], size: int, boxes: Sequence[Sequence[Cell]] = ()) -> bool:
    full = set(range(1, size + 1))
    return all({values[cell] for cell in group} == full for group in [*lines_of(size, size), *boxes])


def _boxes(height: int, width: int) -> list[list[Cell]]:
    size = height * width
    boxes: dict[tuple[int, int], list[Cell]] = {}
    for cell in range(size**2):
        boxes.setdefault((cell // size // height, cell % size // width), []).append(cell)
    return list(boxes.values())


def make_sudoku(rng: random.Random, height: int, width: int, clues: int) -> Made:
    size, boxes = height * width, _boxes(height, width)
    truth = _latin(size, rng, boxes)
    groups = [*lines_of(size, size), *boxes]
    domains = [range(1, size + 1)] * size**2
    start = rng.sample(range(size**2), clues)
    given = hide(truth, unique_clues(truth, domains, groups, rng=rng, given=start))
    question = (
        f"Solve this sudoku: each row, each column and each box of {height} rows and {width} columns has the "
        f"numbers 1 to {size} once.\n\n{show(given, size)}"
    )
    return question, FORM, {"given": given, "box": [height, width]}, show(truth, size)


def check_sudoku(data: Mapping[str, Any], answer: str) -> bool:
    height, width = data["box"]
    values = read_integer_grid(answer, height * width, height * width)
    return matches_given(values, data["given"]) and _is_latin(values, height * width, _boxes(height, width))


def make_futoshiki(rng: random.Random, size: int, signs: int) -> Made:
    truth = _latin(size, rng)
    pairs = [
        (a, b) for a, around in enumerate(neighbours(size, size, diagonal=False)) for b in around if truth[a] < truth[b]
    ]
    less = rng.sample(pairs, signs)
    domains = [range(1, size + 1)] * size**2

    def check(values: list, cell: Cell) -> bool:
        return all(values[a] is None or values[b] is None or values[a] < values[b] for a, b in less if cell in (a, b))

    given = hide(truth, unique_clues(truth, domains, lines_of(size, size), check, rng=rng))

    def place(cell: Cell) -> str:
        return f"row {cell // size + 1} column {cell % size + 1}"

    signs_text = "\n".join(f"{place(a)} < {place(b)}" for a, b in less)
    question = (
        f"Solve this futoshiki: each row and each column has the numbers 1 to {size} once, and these are true:\n"
        f"{signs_text}\n\n{show(given, size)}"
    )
    return question, FORM, {"given": given, "less": less, "size": size}, show(truth, size)


def check_futoshiki(data: Mapping[str, Any], answer: str) -> bool:
    values = read_integer_grid(answer, data["size"], data["size"])
    ordered = all(values[a] < values[b] for a, b in data["less"])
    return ordered and matches_given(values, data["given"]) and _is_latin(values, data["size"])


def _visible(heights: Sequence[int]) -> int:
    return len(set(itertools.accumulate(heights, max)))


def _views(size: int) -> list[list[Cell]]:
    """The cells that one sees from the left of each row, the right, the top of each column and the bottom."""
    lines = lines_of(size, size)
    rows, columns = lines[:size], lines[size:]
    return [*rows, *(row[::-1] for row in rows), *columns, *(column[::-1] for column in columns)]


def make_skyscrapers(rng: random.Random, size: int, clues: int) -> Made:
    truth, views = _latin(size, rng), _views(size)
    seen: list[int | None] = [None] * len(views)
    for view in rng.sample(range(len(views)), clues):
        seen[view] = _visible([truth[cell] for cell in views[view]])
    through = [[view for view, cells in enumerate(views) if cell in cells and seen[view]] for cell in range(size**2)]

    def check(values: list, cell: Cell) -> bool:
        for view in through[cell]:
            heights = [values[each] for each in views[view]]
            if None not in heights and _visible(heights) != seen[view]:
                return False
        return True

    domains = [range(1, size + 1)] * size**2
    given = hide(truth, unique_clues(truth, domains, lines_of(size, size), check, rng=rng))
    sides = ("left of each row", "right of each row", "top of each column", "bottom of each column")
    views_text = "\n".join(
        f"from the {side}: {show(seen[i * size : (i + 1) * size], size)}" for i, side in enumerate(sides)
    )
    question = (
        f"Each cell of a {size} x {size} grid has a building of height 1 to {size}, each height once in every row and "
        f"column. A higher building hides the lower ones behind it. So many buildings are seen (a dot where it is not "
        f"known):\n{views_text}\n\n{show(given, size)}"
    )
    return question, FORM, {"given": given, "seen": seen, "size": size}, show(truth, size)


def check_skyscrapers(data: Mapping[str, Any], answer: str) -> bool:
    values = read_integer_grid(answer, data["size"], data["size"])
    seen = [_visible([values[cell] for cell in view]) for view in _views(data["size"])]
    return (
        matches_given(seen, data["seen"]) and matches_given(values, data["given"]) and _is_latin(values, data["size"])
    )


def _result(operation: str, numbers: Sequence[int]) -> int | None:
    """Of a cage, None where the division leaves a rest."""
    match operation:
        case "+":
            return sum(numbers)
        case "*":
            return math.prod(numbers)
        case "-":
            return max(numbers) - min(numbers)
    return max(numbers) // min(numbers) if max(numbers) % min(numbers) == 0 else None


def _cages(rng: random.Random, size: int) -> list[list[Cell]]:
    """The cells of a square in groups of one to three that touch."""
    around, free, cages = neighbours(size, size, diagonal=False), set(range(size**2)), []
    while free:
        cage = [min(free)]
        free.remove(cage[0])
        while len(cage) < rng.choice([2, 2, 3]):
            border = sorted({each for cell in cage for each in around[cell]} & free)
            if not border:
                break
            cage.append(rng.choice(border))
            free.remove(cage[-1])
        cages.append(cage)
    return cages


def make_calcudoku(rng: random.Random, size: int) -> Made:
    truth, cages = _latin(size, rng), []
    for cells in _cages(rng, size):
        numbers = [truth[cell] for cell in cells]
        operations = ["+", "*", *("-/" if len(cells) == 2 else "")]
        operation = rng.choice([each for each in operations if _result(each, numbers) is not None])
        cages.append([operation, _result(operation, numbers), cells])
    cage_of = {cell: cage for cage in cages for cell in cage[2]}

    def check(values: list, cell: Cell) -> bool:
        operation, result, cells = cage_of[cell]
        numbers = [values[each] for each in cells]
        return None in numbers or _result(operation, numbers) == result

    domains = [range(1, size + 1)] * size**2
    given = hide(truth, unique_clues(truth, domains, lines_of(size, size), check, rng=rng))
    names = [next(chr(65 + i) for i, cage in enumerate(cages) if cell in cage[2]) for cell in range(size**2)]
    cages_text = "\n".join(f"{chr(65 + i)}: {result} by {operation}" for i, (operation, result, _) in enumerate(cages))
    question = (
        f"Solve this calcudoku: each row and each column has the numbers 1 to {size} once, and the numbers of "
        "each cage (cells of one letter) give its result by its operation (- and /: the larger one first).\n\n"
        f"{show(names, size)}\n\n{cages_text}\n\nKnown numbers:\n{show(given, size)}"
    )
    return question, FORM, {"given": given, "cages": cages, "size": size}, show(truth, size)


def check_calcudoku(data: Mapping[str, Any], answer: str) -> bool:
    values = read_integer_grid(answer, data["size"], data["size"])
    if not (matches_given(values, data["given"]) and _is_latin(values, data["size"])):
        return False
    return all(
        _result(operation, [values[cell] for cell in cells]) == result for operation, result, cells in data["cages"]
    )
