"""Grids whose marks make regions or share them: norinori, number walls."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_jax.rewards.puzzles.core import (
    MARKED_GRID,
    Cell,
    Made,
    grown_regions,
    hide,
    marks_possible,
    matches_given,
    members,
    neighbours,
    read_marks,
    show,
    show_marks,
    unique_clues,
)


def _dominoes(size: int, count: int, beside: Sequence[Sequence[Cell]], rng: random.Random) -> set[Cell]:
    """The cells of so many dominoes that do not touch."""
    while True:
        marked: set[Cell] = set()
        for cell in rng.sample(range(size**2), size**2):
            other = rng.choice(beside[cell])
            if len(marked) < 2 * count and not marked & {cell, other, *beside[cell], *beside[other]}:
                marked |= {cell, other}
        if len(marked) == 2 * count:
            return marked


def _paired(touching: Sequence[set[int]], rng: random.Random) -> list[tuple[int, int]] | None:
    """All of these in pairs that touch, or None where chance found none."""
    free, pairs = set(range(len(touching))), []
    while free:
        one = min(free, key=lambda each: (len(touching[each] & free), each))
        if not touching[one] & free:
            return None
        other = rng.choice(sorted(touching[one] & free))
        pairs.append((one, other))
        free -= {one, other}
    return pairs


def make_norinori(rng: random.Random, size: int, dominoes: int) -> Made:
    beside = neighbours(size, size, diagonal=False)
    while True:
        marked = sorted(_dominoes(size, dominoes, beside, rng))
        around_mark = grown_regions({cell: place for place, cell in enumerate(marked)}, size, rng)
        touching: list[set[int]] = [set() for _ in marked]
        for cell, region in enumerate(around_mark):
            touching[region] |= {around_mark[each] for each in beside[cell]} - {region}
        if pairs := _paired(touching, rng):
            break
    pair_of = {each: place for place, pair in enumerate(pairs) for each in pair}
    region = [pair_of[each] for each in around_mark]
    truth = [int(cell in marked) for cell in range(size**2)]
    regions = members(region)

    def check(values: list, cell: Cell) -> bool:
        near = [each for each in (cell, *beside[cell]) if values[each]]
        return marks_possible(values, regions[region[cell]], 2) and all(
            marks_possible(values, beside[each], 1) for each in near
        )

    given = hide(truth, unique_clues(truth, [(0, 1)] * size**2, check=check, rng=rng))
    question = (
        "Mark cells so that each region (cells of one letter) has exactly two, and each marked cell has exactly one "
        "marked cell beside it in its row or column, in whatever region.\n\n"
        f"{show([chr(65 + each) for each in region], size)}\n\nKnown cells:\n{show_marks(given, size)}"
    )
    return question, MARKED_GRID, {"region": region, "given": given, "size": size}, show_marks(truth, size)


def check_norinori(data: Mapping[str, Any], answer: str) -> bool:
    size, values = data["size"], read_marks(answer, data["size"])
    beside = neighbours(size, size, diagonal=False)
    return (
        matches_given(values, data["given"])
        and all(sum(values[cell] for cell in region) == 2 for region in members(data["region"]))
        and all(sum(values[each] for each in beside[cell]) == 1 for cell in range(size**2) if values[cell])
    )


def _island(values: Sequence[int | None], cell: Cell, beside: Sequence[Sequence[Cell]]) -> tuple[set[Cell], bool]:
    """The cells without a wall that hang together with this one, and whether none can be added."""
    island, edge, closed = {cell}, [cell], True
    while edge:
        for each in beside[edge.pop()]:
            closed &= values[each] is not None
            if values[each] == 0 and each not in island:
                island.add(each)
                edge.append(each)
    return island, closed


def _islands_possible(
    values: Sequence[int | None], cells: Iterable[Cell], numbers: Sequence[int | None], beside: Sequence[Sequence[Cell]]
) -> bool:
    """Whether the islands of these cells can still have one number each, which is their size."""
    for cell in cells:
        island, closed = _island(values, cell, beside)
        found = [number for each in island if (number := numbers[each]) is not None]
        if len(found) > 1 or (found and len(island) > found[0]):
            return False
        if closed and (not found or len(island) != found[0]):
            return False
    return True


def _square(cell: Cell, size: int) -> list[Cell]:
    """The cell with the one to its right and the two below; none at the border."""
    inside = cell % size < size - 1 and cell // size < size - 1
    return [cell, cell + 1, cell + size, cell + size + 1] if inside else []


def make_number_wall(rng: random.Random, size: int, largest: int) -> Made:
    beside, squares = neighbours(size, size, diagonal=False), [_square(cell, size) for cell in range(size**2)]
    truth = [1] * size**2
    numbers: list[int | None] = [None] * size**2
    while walled := [square for square in squares if square and all(truth[cell] for cell in square)]:
        # An island begins in the middle of walls and grows where it touches no other.
        island = {rng.choice(rng.choice(walled))}
        if any(not truth[each] for cell in island for each in beside[cell]):
            truth, numbers = [1] * size**2, [None] * size**2
            continue
        for _ in range(rng.randint(0, largest - 1)):
            border = sorted({each for cell in island for each in beside[cell]} - island)
            free = [each for each in border if all(truth[near] or near in island for near in beside[each])]
            island |= {rng.choice(free)} if free else set()
        for cell in island:
            truth[cell] = 0
        numbers[rng.choice(sorted(island))] = len(island)
    within = [[square for square in squares if cell in square] for cell in range(size**2)]

    def check(values: list, cell: Cell) -> bool:
        if values[cell] and any(all(values[each] for each in square) for square in within[cell]):
            return False
        near = [each for each in (cell, *beside[cell]) if values[each] == 0]
        return _islands_possible(values, near, numbers, beside)

    domains = [(0,) if number else (0, 1) for number in numbers]
    given = hide(truth, unique_clues(truth, domains, check=check, rng=rng))
    question = (
        "Mark walls so that the other cells make islands, cells that hang together in rows and columns. Each island "
        "has exactly one number, which is how many cells it has; a number is no wall; no square of 2 x 2 cells is all "
        f"wall.\n\n{show(numbers, size)}\n\nKnown cells:\n{show_marks(given, size)}"
    )
    return question, MARKED_GRID, {"numbers": numbers, "given": given, "size": size}, show_marks(truth, size)


def check_number_wall(data: Mapping[str, Any], answer: str) -> bool:
    size, numbers, values = data["size"], data["numbers"], read_marks(answer, data["size"])
    beside = neighbours(size, size, diagonal=False)
    squares = [square for cell in range(size**2) if (square := _square(cell, size))]
    open_cells = [cell for cell, value in enumerate(values) if not value]
    return (
        matches_given(values, data["given"])
        and not any(values[cell] for cell, number in enumerate(numbers) if number)
        and not any(all(values[cell] for cell in square) for square in squares)
        and _islands_possible(values, open_cells, numbers, beside)
    )
