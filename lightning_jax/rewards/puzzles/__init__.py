"""Logic puzzles, made and verified here: one table of families.

Source: SynLogic (arXiv 2505.19641), as in MiniMax-M1 (arXiv 2506.13585), section 4.1.2.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_jax.errors import UserError
from lightning_jax.rewards.answers import final_part
from lightning_jax.rewards.puzzles import line_marks, logic, marks, moves, numbers, regions, squares
from lightning_jax.rewards.puzzles.core import Family, Puzzle
from lightning_jax.rewards.reward import Completion, Reward, required

__all__ = ["FAMILIES", "LEVELS", "Family", "Puzzle", "make_puzzle", "puzzle_records", "puzzle_reward"]

LEVELS = 5
FAMILIES: Mapping[str, Family] = {
    "binairo": Family(
        line_marks.make_binairo,
        line_marks.check_binairo,
        ((4, 6), (4, 4), (6, 14), (6, 10), (8, 24)),
        unique=True,
    ),
    "brackets": Family(
        logic.make_brackets, logic.check_brackets, ((4, 1), (6, 3), (9, 5), (14, 8), (20, 12)), unique=True
    ),
    "calcudoku": Family(squares.make_calcudoku, squares.check_calcudoku, ((3,), (4,), (4,), (5,), (5,)), unique=True),
    "campsite": Family(
        marks.make_campsite, marks.check_campsite, ((4, 3), (5, 4), (6, 6), (7, 8), (8, 10)), unique=True
    ),
    "cipher": Family(
        logic.make_cipher,
        logic.check_cipher,
        ((1, False), (2, False), (2, True), (4, True), (8, True)),
        unique=True,
    ),
    "countdown": Family(
        numbers.make_countdown, numbers.check_countdown, ((4, 3), (4, 4), (5, 4), (6, 5), (6, 6)), unique=False
    ),
    "cryptarithm": Family(
        numbers.make_cryptarithm, numbers.check_cryptarithm, ((2,), (3,), (4,), (5,), (6,)), unique=True
    ),
    "directions": Family(logic.make_directions, logic.check_directions, ((3,), (5,), (8,), (12,), (20,)), unique=True),
    "futoshiki": Family(
        squares.make_futoshiki,
        squares.check_futoshiki,
        ((3, 3), (4, 5), (4, 8), (5, 10), (5, 14)),
        unique=True,
    ),
    "game_of_24": Family(
        numbers.make_game_of_24,
        numbers.check_game_of_24,
        ((3, 9), (4, 6), (4, 9), (4, 13), (5, 13)),
        unique=False,
    ),
    "goods_exchange": Family(
        logic.make_goods_exchange,
        logic.check_goods_exchange,
        ((3, 3), (4, 5), (5, 8), (6, 12), (8, 20)),
        unique=True,
    ),
    "hanoi": Family(moves.make_hanoi, moves.check_hanoi, ((2,), (3,), (4,), (5,), (6,)), unique=False),
    "kakurasu": Family(
        line_marks.make_kakurasu, line_marks.check_kakurasu, ((3,), (4,), (4,), (5,), (6,)), unique=True
    ),
    "knights_and_knaves": Family(
        logic.make_knights_and_knaves,
        logic.check_knights_and_knaves,
        ((3,), (4,), (5,), (6,), (8,)),
        unique=True,
    ),
    "lights_out": Family(
        marks.make_lights_out, marks.check_lights_out, ((3, 2), (3, 4), (4, 4), (5, 6), (6, 12)), unique=False
    ),
    "maze": Family(moves.make_maze, moves.check_maze, ((4,), (5,), (7,), (10,), (14,)), unique=False),
    "minesweeper": Family(
        marks.make_minesweeper,
        marks.check_minesweeper,
        ((3, 2), (4, 3), (5, 5), (6, 8), (7, 11)),
        unique=True,
    ),
    "nonogram": Family(
        line_marks.make_nonogram, line_marks.check_nonogram, ((3,), (4,), (5,), (6,), (7,)), unique=True
    ),
    "norinori": Family(
        regions.make_norinori, regions.check_norinori, ((4, 3), (5, 4), (6, 5), (6, 6), (7, 8)), unique=True
    ),
    "number_wall": Family(
        regions.make_number_wall, regions.check_number_wall, ((4, 3), (5, 3), (5, 5), (6, 5), (7, 6)), unique=True
    ),
    "numbrix": Family(
        numbers.make_numbrix, numbers.check_numbrix, ((3, 2), (4, 5), (4, 3), (5, 6), (6, 12)), unique=True
    ),
    "operation": Family(numbers.make_operation, numbers.check_operation, ((1,), (2,), (3,), (4,), (6,)), unique=True),
    "operators": Family(numbers.make_operators, numbers.check_operators, ((3,), (4,), (5,), (6,), (8,)), unique=False),
    "queens": Family(marks.make_queens, marks.check_queens, ((5, 2), (6, 2), (7, 2), (8, 2), (8, 1)), unique=False),
    "satisfiability": Family(
        logic.make_satisfiability,
        logic.check_satisfiability,
        ((4, 10), (5, 15), (6, 20), (8, 30), (10, 40)),
        unique=False,
    ),
    "skyscrapers": Family(
        squares.make_skyscrapers,
        squares.check_skyscrapers,
        ((3, 9), (4, 12), (4, 8), (5, 16), (5, 12)),
        unique=True,
    ),
    "sliding": Family(
        moves.make_sliding,
        moves.check_sliding,
        ((2, 2, 4), (3, 2, 8), (3, 3, 10), (3, 3, 20), (4, 4, 25)),
        unique=False,
    ),
    "star_placement": Family(
        marks.make_star_placement, marks.check_star_placement, ((4,), (5,), (6,), (7,), (8,)), unique=True
    ),
    "sudoku": Family(
        squares.make_sudoku,
        squares.check_sudoku,
        ((2, 2, 9), (2, 2, 6), (2, 3, 16), (3, 3, 40), (3, 3, 30)),
        unique=True,
    ),
    "survo": Family(
        numbers.make_survo,
        numbers.check_survo,
        ((3, 2, 1), (3, 3, 3), (3, 3, 2), (4, 3, 5), (4, 3, 3)),
        unique=True,
    ),
    "water_jugs": Family(
        moves.make_water_jugs,
        moves.check_water_jugs,
        ((2, 2), (2, 4), (3, 4), (3, 5), (3, 6)),
        unique=False,
    ),
    "word_sorting": Family(
        logic.make_word_sorting, logic.check_word_sorting, ((4,), (7,), (11,), (16,), (25,)), unique=True
    ),
    "zebra": Family(logic.make_zebra, logic.check_zebra, ((3, 2), (3, 3), (4, 2), (4, 3), (4, 4)), unique=True),
}


def make_puzzle(family: str, level: int, seed: int) -> Puzzle:
    """A puzzle, always the same for the same arguments.

    Args:
        level: 1, easy, to 5, difficult.

    Raises:
        UserError: there is no such family or level.
    """
    if family not in FAMILIES:
        raise UserError(f"there is no family of puzzles {family!r}; there are {', '.join(FAMILIES)}")
    if not 1 <= level <= LEVELS:
        raise UserError(f"puzzles have levels 1 to {LEVELS}, not {level}")
    rng = random.Random(f"{family}/{level}/{seed}")
    question, form, data, solution = FAMILIES[family].make(rng, *FAMILIES[family].levels[level - 1])
    prompt = f"{question}\n\nGive your answer between <answer> and </answer>: {form}."
    return Puzzle(family, prompt, json.loads(json.dumps(data)), solution)


def puzzle_records(
    levels: Sequence[int], seed: int, families: Sequence[str] = tuple(FAMILIES)
) -> Iterator[dict[str, Any]]:
    """Records without end, of all families and levels in turn: a chat, and what its reward reads."""
    number = 0
    while True:
        for level in levels:
            for family in families:
                puzzle = make_puzzle(family, level, seed + number)
                yield {
                    "messages": [{"role": "user", "content": puzzle.prompt}],
                    "dataset": "puzzles",
                    "family": family,
                    "level": level,
                    "ground_truth": puzzle.data,
                }
        number += 1


def puzzle_reward(completions: Sequence[Completion], /) -> list[Reward]:
    """One for an answer that solves the record's puzzle; any solution does."""
    rewards = []
    for completion in completions:
        name = required(completion, "family")
        if name not in FAMILIES:
            raise UserError(f"there is no family of puzzles {name!r}; there are {', '.join(FAMILIES)}")
        solved = FAMILIES[name].accepts(required(completion, "ground_truth"), final_part(completion.text))
        rewards.append(Reward(float(solved), f"{name} {'solved' if solved else 'not solved'}"))
    return rewards
