"""What all families of puzzles share: their form, a solver that counts to two, and how answers are read.

Source: SynLogic (arXiv 2505.19641), section 2, for what a family is; MiniMax-M1 (arXiv 2506.13585), section 4.1.2.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_ANSWER = 10_000  # characters
Cell = int
Check = Callable[[list[Any], Cell], bool]
Made = tuple[str, str, dict[str, Any], str]  # question, form of the answer, data, solution


@dataclass(frozen=True)
class Puzzle:
    """A puzzle to ask.

    Attributes:
        family: its name in the table of families.
        prompt: the question, with the form that the answer has to have.
        data: what the verifier reads, as JSON holds it.
        solution: an answer that is accepted; others may be too.
    """

    family: str
    prompt: str
    data: Mapping[str, Any]
    solution: str


@dataclass(frozen=True)
class Family:
    """One kind of puzzle.

    Attributes:
        make: a puzzle from a random number generator and a level.
        check: whether an answer to the data is right; ValueError where it is none at all.
        levels: what `make` takes, from easy to difficult.
        unique: whether there is one solution only.
    """

    make: Callable[..., Made]
    check: Callable[[Mapping[str, Any], str], bool]
    levels: Sequence[tuple]
    unique: bool

    def accepts(self, data: Mapping[str, Any], answer: str) -> bool:
        try:
            return len(answer) <= LONGEST_ANSWER and self.check(data, answer)
        except ValueError:
            return False


def solutions(
    domains: Sequence[Sequence[Any]],
    groups: Iterable[Sequence[Cell]] = (),
    check: Check = lambda values, cell: True,
    rng: random.Random | None = None,
) -> Iterator[list[Any]]:
    """Every assignment of a value to each cell; lazily, so that asking for two of them tells whether one is unique.

    The cell with the fewest values left is filled next, the first of them where there are several.

    Args:
        domains: the values that each cell may have.
        groups: cells that all have different values.
        check: of the values so far, None for cells without one, and the cell that was filled last.
        rng: tries values in random order.
    """
    left = [list(domain) for domain in domains]
    if rng:
        for domain in left:
            rng.shuffle(domain)
    members: list[set[Cell]] = [set() for _ in left]
    for group in groups:
        for cell in group:
            members[cell] |= set(group) - {cell}
    values: list[Any] = [None] * len(left)

    def search() -> Iterator[list[Any]]:
        empty = [cell for cell, value in enumerate(values) if value is None]
        if not empty:
            yield list(values)
            return
        cell = min(empty, key=lambda each: len(left[each]))
        for value in list(left[cell]):
            values[cell] = value
            if check(values, cell):
                changed = [each for each in members[cell] if values[each] is None and value in left[each]]
                places = [left[each].index(value) for each in changed]
                for each in changed:
                    left[each].remove(value)
                if all(left[each] for each in changed):
                    yield from search()
                for each, place in zip(changed, places, strict=True):
                    left[each].insert(place, value)
        values[cell] = None

    return search()


def reveal_until_unique(
    truth: Sequence[Any], given: set[Cell], solve: Callable[[set[Cell]], Iterator[Sequence[Any]]], rng: random.Random
) -> set[Cell]:
    """The cells to give away so that `truth` is the only solution: one where another solution differs, until none is.

    Args:
        given: cells that are given away already.
        solve: all solutions where these cells have their true values.
    """
    given = set(given)
    while other := next((each for each in solve(given) if list(each) != list(truth)), None):
        given.add(rng.choice([cell for cell, value in enumerate(truth) if other[cell] != value]))
    return given


def unique_clues(
    truth: Sequence[Any],
    domains: Sequence[Sequence[Any]],
    groups: Sequence[Sequence[Cell]] = (),
    check: Check = lambda values, cell: True,
    *,
    rng: random.Random,
    given: Iterable[Cell] = (),
) -> set[Cell]:
    """`reveal_until_unique` where the solutions are those of `solutions`."""

    def solve(given: set[Cell]) -> Iterator[list[Any]]:
        known = [[truth[cell]] if cell in given else domain for cell, domain in enumerate(domains)]
        return solutions(known, groups, check)

    return reveal_until_unique(truth, set(given), solve, rng)


def lines_of(width: int, height: int) -> list[list[Cell]]:
    """The rows and columns of a grid whose cells are numbered row by row."""
    rows = [[row * width + column for column in range(width)] for row in range(height)]
    return rows + [list(column) for column in zip(*rows, strict=True)]


def neighbours(width: int, height: int, *, diagonal: bool) -> list[list[Cell]]:
    """For each cell the ones around it."""
    result = []
    for row in range(height):
        for column in range(width):
            around = []
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    near = (down or right) and (diagonal or not (down and right))
                    if near and 0 <= row + down < height and 0 <= column + right < width:
                        around.append((row + down) * width + column + right)
            result.append(around)
    return result


def grown_regions(seeds: Mapping[Cell, int], size: int, rng: random.Random) -> list[int]:
    """The region of each cell of a square: each grows from its seed, until no cell is left."""
    beside = neighbours(size, size, diagonal=False)
    region = dict(seeds)
    while free := [cell for cell in range(size**2) if cell not in region]:
        cell = rng.choice(free)
        if near := [region[each] for each in beside[cell] if each in region]:
            region[cell] = rng.choice(near)
    return [region[cell] for cell in range(size**2)]


def members(region: Sequence[int]) -> list[list[Cell]]:
    """The cells of each region."""
    return [[cell for cell, each in enumerate(region) if each == one] for one in range(max(region) + 1)]


def show(values: Sequence[Any], width: int, empty: str = ".") -> str:
    """A grid as text: a line for each row, spaces between."""
    cells = [empty if value is None else str(value) for value in values]
    longest = max(map(len, cells))
    rows = (cells[start : start + width] for start in range(0, len(cells), width))
    return "\n".join(" ".join(cell.rjust(longest) for cell in row) for row in rows)


def read_grid(answer: str, width: int, height: int) -> list[str]:
    """The cells of an answer that is such a grid. Raises ValueError for any other."""
    rows = [line.split() for line in answer.strip().splitlines() if line.strip()]
    if len(rows) != height or any(len(row) != width for row in rows):
        raise ValueError("not a grid of this size")
    return [cell for row in rows for cell in row]


def read_integers(answer: str) -> list[int]:
    """The numbers of an answer of numbers, commas and spaces alone. Raises ValueError for any other."""
    words = answer.replace(",", " ").split()
    if not all(word.lstrip("-").isascii() and word.lstrip("-").isdigit() and len(word) < 20 for word in words):
        raise ValueError("not only integers")
    return [int(word) for word in words]


def read_integer_grid(answer: str, width: int, height: int) -> list[int]:
    return read_integers(" ".join(read_grid(answer, width, height)))


def read_pairs(answer: str) -> dict[str, str]:
    """`name: value` in each line. Raises ValueError for anything else, and where a name comes twice."""
    pairs: dict[str, str] = {}
    for line in answer.strip().splitlines():
        name, colon, value = line.partition(":")
        if not colon or name.strip() in pairs:
            raise ValueError("not a name and a value in each line")
        pairs[name.strip()] = value.strip()
    return pairs


def matches_given(values: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether the values are the given ones where there are any."""
    return len(values) == len(given) and all(b is None or a == b for a, b in zip(values, given, strict=True))


def hide(truth: Sequence[Any], given: set[Cell]) -> list[Any]:
    """The values given away, None for the others."""
    return [value if cell in given else None for cell, value in enumerate(truth)]


MARKED_GRID = "the full grid, one line for each row, cells separated by spaces, X for a marked cell and . for any other"
MARKS = {"X": 1, ".": 0}


def read_marks(answer: str, size: int) -> list[int]:
    cells = read_grid(answer, size, size)
    if not set(cells) <= set(MARKS):
        raise ValueError("cells are X or .")
    return [MARKS[cell] for cell in cells]


def show_marks(values: Sequence[int | None], size: int) -> str:
    return show([None if value is None else ".X"[value] for value in values], size, empty="?")


def marks_possible(values: Sequence[int | None], cells: Sequence[Cell], total: int) -> bool:
    """Whether so many of these cells can still be marked."""
    marked = sum(values[cell] == 1 for cell in cells)
    return marked <= total <= marked + sum(values[cell] is None for cell in cells)
