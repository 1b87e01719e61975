"""Puzzles that are solved by moves: mazes, the tower of Hanoi, water jugs, the sliding puzzle."""

import functools
import operator
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lightning_jax.rewards.puzzles.core import Made, neighbours, show

State = TypeVar("State", bound=Hashable)
STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def shortest(
    start: State, done: Callable[[State], bool], moves: Callable[[State], Iterable[tuple[str, State]]]
) -> list[str]:
    """The moves of a shortest way; none where there is no way, or nothing to do."""
    before: dict[State, tuple[str, State] | None] = {start: None}
    edge = [start]
    while edge:
        following = []
        for state in edge:
            if done(state):
                way = []
                while (step := before[state]) is not None:
                    way.append(step[0])
                    state = step[1]
                return way[::-1]
            for name, after in moves(state):
                if after not in before:
                    before[after] = (name, state)
                    following.append(after)
        edge = following
    return []


def follow(start: State, words: Sequence[str], moves: Callable[[State], Iterable[tuple[str, State]]]) -> State:
    """Where the moves of an answer lead. Raises ValueError where one is not possible."""
    state = start
    for word in words:
        after = next((after for name, after in moves(state) if name == word), None)
        if after is None:
            raise ValueError(f"{word} is not possible")
        state = after
    return state


def _maze_moves(walls: Sequence[int], size: int) -> Callable[[int], list[tuple[str, int]]]:
    def moves(cell: int) -> list[tuple[str, int]]:
        row, column = divmod(cell, size)
        places = ((name, row + down, column + right) for name, (down, right) in STEPS.items())
        inside = [(name, r * size + c) for name, r, c in places if 0 <= r < size and 0 <= c < size]
        return [(name, after) for name, after in inside if not walls[after]]

    return moves


def make_maze(rng: random.Random, size: int) -> Made:
    while True:
        walls = [int(rng.random() < 0.35) for _ in range(size**2)]
        start, goal = rng.sample(range(size**2), 2)
        walls[start] = walls[goal] = 0
        way = shortest(start, functools.partial(operator.eq, goal), _maze_moves(walls, size))
        if len(way) >= size:
            break
    shown = ["S" if cell == start else "G" if cell == goal else ".#"[wall] for cell, wall in enumerate(walls)]
    question = (
        f"Find a shortest way from S to G that does not enter a wall (#), by steps up, down, left and right.\n\n"
        f"{show(shown, size)}"
    )
    data = {"walls": walls, "start": start, "goal": goal, "length": len(way), "size": size}
    return question, "the steps as letters U, D, L, R", data, "".join(way)


def check_maze(data: Mapping[str, Any], answer: str) -> bool:
    steps = "".join(answer.replace(",", " ").split())
    end = follow(data["start"], steps, _maze_moves(data["walls"], data["size"]))
    return len(steps) == data["length"] and end == data["goal"]


def _hanoi_moves(pegs: tuple[tuple[int, ...], ...]) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    """Pegs are their disks from the bottom."""
    after = []
    for i, source in enumerate(pegs):
        for j, target in enumerate(pegs):
            if i != j and source and (not target or target[-1] > source[-1]):
                new = list(pegs)
                new[i], new[j] = source[:-1], (*target, source[-1])
                after.append(("ABC"[i] + "ABC"[j], tuple(new)))
    return after


def make_hanoi(rng: random.Random, disks: int) -> Made:
    goal = ((), (), tuple(range(disks, 0, -1)))
    while True:
        pegs: list[list[int]] = [[], [], []]
        for disk in range(disks, 0, -1):
            rng.choice(pegs).append(disk)
        start = tuple(map(tuple, pegs))
        way = shortest(start, functools.partial(operator.eq, goal), _hanoi_moves)
        if len(way) >= 2 ** (disks - 1):
            break
    listed = "; ".join(f"{name}: {' '.join(map(str, peg)) or 'none'}" for name, peg in zip("ABC", start, strict=True))
    question = (
        f"Disks lie on three pegs, from the bottom: {listed}. Move one disk at a time from the top of a peg to "
        f"another, never onto a smaller one (a smaller number), until all are on C, in at most {len(way)} moves."
    )
    return question, "the moves such as AC AB, from peg and to peg", {"pegs": start, "most": len(way)}, " ".join(way)


def check_hanoi(data: Mapping[str, Any], answer: str) -> bool:
    moves = answer.replace(",", " ").split()
    end = follow(tuple(map(tuple, data["pegs"])), moves, _hanoi_moves)
    return len(moves) <= data["most"] and not end[0] and not end[1]


def _jug_moves(sizes: Sequence[int]) -> Callable[[tuple[int, ...]], list[tuple[str, tuple[int, ...]]]]:
    def moves(jugs: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        after = []
        for i, (water, size) in enumerate(zip(jugs, sizes, strict=True)):
            after.append((f"fill{i + 1}", (*jugs[:i], size, *jugs[i + 1 :])))
            after.append((f"empty{i + 1}", (*jugs[:i], 0, *jugs[i + 1 :])))
            for j in range(len(jugs)):
                if i != j:
                    poured = min(water, sizes[j] - jugs[j])
                    new = list(jugs)
                    new[i], new[j] = water - poured, jugs[j] + poured
                    after.append((f"pour{i + 1}{j + 1}", tuple(new)))
        return after

    return moves


def _measured(target: int, jugs: tuple[int, ...]) -> bool:
    return jugs[-1] == target


def make_water_jugs(rng: random.Random, jugs: int, steps: int) -> Made:
    while True:
        sizes = rng.sample(range(3, 20), jugs)
        target = rng.randint(1, sizes[-1])
        way = shortest((0,) * jugs, functools.partial(_measured, target), _jug_moves(sizes))
        if len(way) >= steps:
            break
    question = (
        f"You have empty jugs of {', '.join(map(str, sizes))} litres, numbered from 1, and a tap. Measure exactly "
        f"{target} litres in the last one, in at most {len(way) + 2} moves: fillN, emptyN, and pourNM from jug N to "
        "jug M until one is empty or full."
    )
    data = {"sizes": sizes, "target": target, "most": len(way) + 2}
    return question, "the moves, separated by spaces", data, " ".join(way)


def check_water_jugs(data: Mapping[str, Any], answer: str) -> bool:
    moves = answer.replace(",", " ").split()
    end = follow((0,) * len(data["sizes"]), moves, _jug_moves(data["sizes"]))
    return len(moves) <= data["most"] and _measured(data["target"], end)


def _slides(width: int, height: int) -> Callable[[tuple[int, ...]], list[tuple[str, tuple[int, ...]]]]:
    around = neighbours(width, height, diagonal=False)

    def moves(tiles: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        hole, after = tiles.index(0), []
        for cell in around[hole]:
            new = list(tiles)
            new[hole], new[cell] = tiles[cell], 0
            after.append((str(tiles[cell]), tuple(new)))
        return after

    return moves


def make_sliding(rng: random.Random, width: int, height: int, steps: int) -> Made:
    goal = (*range(1, width * height), 0)
    moves, tiles, before = _slides(width, height), goal, None
    solution: list[str] = []
    while len(solution) < steps or tiles == goal:
        name, after = rng.choice([each for each in moves(tiles) if each[1] != before])
        before, tiles = tiles, after
        solution.append(name)
    question = (
        "Slide tiles into the empty place (0), one beside it at a time, until the numbers are in order and the "
        f"empty place is last. At most {2 * steps} moves.\n\n{show(tiles, width)}"
    )
    data = {"tiles": tiles, "width": width, "height": height, "most": 2 * steps}
    return question, "the numbers of the tiles in the order of their moves", data, " ".join(reversed(solution))


def check_sliding(data: Mapping[str, Any], answer: str) -> bool:
    moves = answer.replace(",", " ").split()
    end = follow(tuple(data["tiles"]), moves, _slides(data["width"], data["height"]))
    return len(moves) <= data["most"] and end == (*range(1, len(end)), 0)
