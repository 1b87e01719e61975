"""Grids whose marks look at the cells around: minesweeper, campsite, star placement, lights out, queens."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_jax.rewards.puzzles.core import (
    MARKED_GRID,
    Cell,
    Made,
    grown_regions,
    hide,
    lines_of,
    marks_possible,
    matches_given,
    members,
    neighbours,
    read_marks,
    show,
    show_marks,
    solutions,
    unique_clues,
)


def make_minesweeper(rng: random.Random, size: int, mines: int) -> Made:
    cells, around = range(size**2), neighbours(size, size, diagonal=True)
    mined = set(rng.sample(cells, mines))
    truth = [int(cell in mined) for cell in cells]
    counts = {cell: sum(truth[each] for each in around[cell]) for cell in cells if not truth[cell]}

    def solve(shown: set[Cell]) -> Iterator[list[int]]:
        numbers = {cell: counts[cell] for cell in shown if cell in counts}

        def check(values: list, cell: Cell) -> bool:
            touched = [each for each in (*around[cell], cell) if each in numbers]
            right = all(marks_possible(values, around[each], numbers[each]) for each in touched)
            return right and marks_possible(values, cells, mines)

        return solutions([(0,) if cell in numbers else (0, 1) for cell in cells], check=check)

    shown = set(rng.sample(sorted(counts), len(counts) // 3))
    while other := next((each for each in solve(shown) if each != truth), None):
        # A mine tells no number: what is shown is a free cell that the other solution takes for a mine.
        shown.add(rng.choice([cell for cell in counts if other[cell]]))
    numbers = [counts[cell] if cell in shown else None for cell in cells]
    question = (
        "In this minefield a number tells how many of the up to eight cells around it have a mine; a cell with a "
        f"number has none, and nobody knows the others. There are {mines} mines. Mark them.\n\n{show(numbers, size)}"
    )
    return question, MARKED_GRID, {"numbers": numbers, "mines": mines, "size": size}, show_marks(truth, size)


def check_minesweeper(data: Mapping[str, Any], answer: str) -> bool:
    values, around = read_marks(answer, data["size"]), neighbours(data["size"], data["size"], diagonal=True)
    right = all(
        not values[cell] and sum(values[each] for each in around[cell]) == number
        for cell, number in enumerate(data["numbers"])
        if number is not None
    )
    return right and sum(values) == data["mines"]


def _matched(trees: Sequence[Cell], tents: set[Cell], around: Sequence[Sequence[Cell]]) -> bool:
    """Whether each tree can have a tent of its own beside it, and each tent its tree."""
    tree_of: dict[Cell, Cell] = {}

    def give(tree: Cell, asked: set[Cell]) -> bool:
        for tent in around[tree]:
            if tent in tents and tent not in asked:
                asked.add(tent)
                if tent not in tree_of or give(tree_of[tent], asked):
                    tree_of[tent] = tree
                    return True
        return False

    return len(trees) == len(tents) and all(give(tree, set()) for tree in trees)


def make_campsite(rng: random.Random, size: int, tents: int) -> Made:
    cells, lines = range(size**2), lines_of(size, size)
    beside, around = (neighbours(size, size, diagonal=each) for each in (False, True))
    while True:
        placed: set[Cell] = set()
        trees: set[Cell] = set()
        for tent in rng.sample(cells, len(cells)):
            places = [each for each in beside[tent] if each not in trees and each not in placed]
            if len(placed) < tents and tent not in trees and places and not placed & set(around[tent]):
                placed.add(tent)
                trees.add(rng.choice(places))
        if len(placed) == tents:
            break
    truth = [int(cell in placed) for cell in cells]
    totals = [sum(truth[cell] for cell in line) for line in lines]
    domains = [(0, 1) if cell not in trees and trees & set(beside[cell]) else (0,) for cell in cells]

    def check(values: list, cell: Cell) -> bool:
        if values[cell] and any(values[each] for each in around[cell]):
            return False
        row, column = cell // size, size + cell % size
        if not all(marks_possible(values, lines[each], totals[each]) for each in (row, column)):
            return False
        return None in values or _matched(sorted(trees), {each for each in cells if values[each]}, beside)

    given = unique_clues(truth, domains, check=check, rng=rng)
    shown = ["T" if cell in trees else ".X"[truth[cell]] if cell in given else None for cell in cells]
    question = (
        "Put up tents (X) on this campsite. Each tree (T) has a tent of its own, beside it in its row or column; "
        f"tents do not touch, not even diagonally. Tents in each row: {totals[:size]}; in each column: "
        f"{totals[size:]}. Trees are "
        f"not marked in the answer. ? is not known yet.\n\n{show(shown, size, empty='?')}"
    )
    data = {"trees": sorted(trees), "totals": totals, "given": hide(truth, given), "size": size}
    return question, MARKED_GRID, data, show_marks(truth, size)


def check_campsite(data: Mapping[str, Any], answer: str) -> bool:
    size, values = data["size"], read_marks(answer, data["size"])
    beside, around = (neighbours(size, size, diagonal=each) for each in (False, True))
    tents = {cell for cell, value in enumerate(values) if value}
    return (
        matches_given(values, data["given"])
        and [sum(values[cell] for cell in line) for line in lines_of(size, size)] == data["totals"]
        and not tents & set(data["trees"])
        and not any(tents & set(around[cell]) for cell in tents)
        and _matched(data["trees"], tents, beside)
    )


def make_star_placement(rng: random.Random, size: int) -> Made:
    around = neighbours(size, size, diagonal=True)
    while True:
        columns = rng.sample(range(size), size)
        if all(abs(a - b) > 1 for a, b in itertools.pairwise(columns)):
            break
    truth = [int(columns[cell // size] == cell % size) for cell in range(size**2)]
    region = grown_regions({row * size + column: row for row, column in enumerate(columns)}, size, rng)
    groups = [*lines_of(size, size), *members(region)]

    def check(values: list, cell: Cell) -> bool:
        if values[cell] and any(values[each] for each in around[cell]):
            return False
        return all(marks_possible(values, group, 1) for group in groups if cell in group)

    given = unique_clues(truth, [(0, 1)] * size**2, check=check, rng=rng)
    question = (
        "Place stars so that each row, each column and each region (cells of one letter) has exactly one, and no "
        f"two touch, not even diagonally.\n\n{show([chr(65 + each) for each in region], size)}\n\n"
        f"Known cells:\n{show_marks(hide(truth, given), size)}"
    )
    return question, MARKED_GRID, {"region": region, "given": hide(truth, given), "size": size}, show_marks(truth, size)


def check_star_placement(data: Mapping[str, Any], answer: str) -> bool:
    size, values = data["size"], read_marks(answer, data["size"])
    around = neighbours(size, size, diagonal=True)
    return (
        matches_given(values, data["given"])
        and all(sum(values[cell] for cell in group) == 1 for group in [*lines_of(size, size), *members(data["region"])])
        and not any(values[cell] and any(values[each] for each in around[cell]) for cell in range(size**2))
    )


def _pressed(lights: Sequence[int], presses: Sequence[int], size: int) -> list[int]:
    beside = neighbours(size, size, diagonal=False)
    return [
        (light + presses[cell] + sum(presses[each] for each in beside[cell])) % 2 for cell, light in enumerate(lights)
    ]


def make_lights_out(rng: random.Random, size: int, presses: int) -> Made:
    pressed = set(rng.sample(range(size**2), presses))
    truth = [int(cell in pressed) for cell in range(size**2)]
    lights = _pressed([0] * size**2, truth, size)
    question = (
        "Pressing a lamp switches it and those beside it in its row and column. Mark the lamps to press so that "
        f"all are off. Lamps that are on are X:\n\n{show_marks(lights, size)}"
    )
    return question, MARKED_GRID, {"lights": lights, "size": size}, show_marks(truth, size)


def check_lights_out(data: Mapping[str, Any], answer: str) -> bool:
    return not any(_pressed(data["lights"], read_marks(answer, data["size"]), data["size"]))


def make_queens(rng: random.Random, size: int, given: int) -> Made:
    def check(values: list, row: Cell) -> bool:
        return all(
            other is None or each == row or (other != values[row] and abs(other - values[row]) != abs(each - row))
            for each, other in enumerate(values)
        )

    columns = next(solutions([range(size)] * size, check=check, rng=rng))
    truth = [int(columns[cell // size] == cell % size) for cell in range(size**2)]
    placed = {row * size + columns[row] for row in rng.sample(range(size), given)}
    question = (
        f"Place queens so that each row and each column of this {size} x {size} board has exactly one, and no two "
        "are on one diagonal. Those marked "
        f"stay.\n\n{show_marks([int(cell in placed) for cell in range(size**2)], size)}"
    )
    return question, MARKED_GRID, {"placed": sorted(placed), "size": size}, show_marks(truth, size)


def check_queens(data: Mapping[str, Any], answer: str) -> bool:
    size, values = data["size"], read_marks(answer, data["size"])
    queens = [divmod(cell, size) for cell, value in enumerate(values) if value]
    apart = all(a != c and b != d and abs(a - c) != abs(b - d) for (a, b), (c, d) in itertools.combinations(queens, 2))
    return len(queens) == size and apart and all(values[cell] for cell in data["placed"])
