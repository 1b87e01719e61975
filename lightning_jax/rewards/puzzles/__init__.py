"""Logic puzzles, made and verified here: one table of families.

Source: SynLogic (arXiv 2505.19641), as in MiniMax-M1 (arXiv 2506.13585), section 4.1.2.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_jax.errors import UserError
from lightning_jax.rewards.answers import final_part
from lightning_jax.rewards.puzzles import line_marks, logic, marks, moves, numbers, squares
from lightning_jax.rewards.puzzles.core import Family, Puzzle
from lightning_jax.rewards.reward import Completion, Reward, required

__all__ = ["FAMILIES", "LEVELS", "Family", "Puzzle", "make_puzzle", "puzzle_records", "puzzle_reward"]

LEVELS = 5
# make, check, what `make` takes from level 1 to level 5, whether there is one solution only
FAMILIES: Mapping[str, Family] = {
    name: Family(*row)
    for name, row in {
        "binairo": (
            line_marks.make_binairo,
            line_marks.check_binairo,
            ((4, 6), (4, 4), (6, 14), (6, 10), (8, 24)),
            True,
        ),
        "brackets": (logic.make_brackets, logic.check_brackets, ((4, 1), (6, 3), (9, 5), (14, 8), (20, 12)), True),
        "calcudoku": (squares.make_calcudoku, squares.check_calcudoku, ((3,), (4,), (4,), (5,), (5,)), True),
        "campsite": (marks.make_campsite, marks.check_campsite, ((4, 3), (5, 4), (6, 6), (7, 8), (8, 10)), True),
        "cipher": (
            logic.make_cipher,
            logic.check_cipher,
            ((1, False), (2, False), (2, True), (4, True), (8, True)),
            True,
        ),
        "countdown": (numbers.make_countdown, numbers.check_countdown, ((4, 3), (4, 4), (5, 4), (6, 5), (6, 6)), False),
        "cryptarithm": (numbers.make_cryptarithm, numbers.check_cryptarithm, ((2,), (3,), (4,), (5,), (6,)), True),
        "directions": (logic.make_directions, logic.check_directions, ((3,), (5,), (8,), (12,), (20,)), True),
        "futoshiki": (
            squares.make_futoshiki,
            squares.check_futoshiki,
            ((3, 3), (4, 5), (4, 8), (5, 10), (5, 14)),
            True,
        ),
        "game_of_24": (
            numbers.make_game_of_24,
            numbers.check_game_of_24,
            ((3, 9), (4, 6), (4, 9), (4, 13), (5, 13)),
            False,
        ),
        "goods_exchange": (
            logic.make_goods_exchange,
            logic.check_goods_exchange,
            ((3, 3), (4, 5), (5, 8), (6, 12), (8, 20)),
            True,
        ),
        "hanoi": (moves.make_hanoi, moves.check_hanoi, ((2,), (3,), (4,), (5,), (6,)), False),
        "kakurasu": (line_marks.make_kakurasu, line_marks.check_kakurasu, ((3,), (4,), (4,), (5,), (6,)), True),
        "knights_and_knaves": (
            logic.make_knights_and_knaves,
            logic.check_knights_and_knaves,
            ((3,), (4,), (5,), (6,), (8,)),
            True,
        ),
        "lights_out": (marks.make_lights_out, marks.check_lights_out, ((3, 2), (3, 4), (4, 4), (5, 6), (6, 12)), False),
        "maze": (moves.make_maze, moves.check_maze, ((4,), (5,), (7,), (10,), (14,)), False),
        "minesweeper": (
            marks.make_minesweeper,
            marks.check_minesweeper,
            ((3, 2), (4, 3), (5, 5), (6, 8), (7, 11)),
            True,
        ),
        "nonogram": (line_marks.make_nonogram, line_marks.check_nonogram, ((3,), (4,), (5,), (6,), (7,)), True),
        "numbrix": (numbers.make_numbrix, numbers.check_numbrix, ((3, 2), (4, 5), (4, 3), (5, 6), (6, 12)), True),
        "operation": (numbers.make_operation, numbers.check_operation, ((1,), (2,), (3,), (4,), (6,)), True),
        "operators": (numbers.make_operators, numbers.check_operators, ((3,), (4,), (5,), (6,), (8,)), False),
        "queens": (marks.make_queens, marks.check_queens, ((5, 2), (6, 2), (7, 2), (8, 2), (8, 1)), False),
        "satisfiability": (
            logic.make_satisfiability,
            logic.check_satisfiability,
            ((4, 10), (5, 15), (6, 20), (8, 30), (10, 40)),
            False,
        ),
        "skyscrapers": (
            squares.make_skyscrapers,
            squares.check_skyscrapers,
            ((3, 9), (4, 12), (4, 8), (5, 16), (5, 12)),
            True,
        ),
        "sliding": (
            moves.make_sliding,
            moves.check_sliding,
            ((2, 2, 4), (3, 2, 8), (3, 3, 10), (3, 3, 20), (4, 4, 25)),
            False,
        ),
        "star_placement": (marks.make_star_placement, marks.check_star_placement, ((4,), (5,), (6,), (7,), (8,)), True),
        "sudoku": (
            squares.make_sudoku,
            squares.check_sudoku,
            ((2, 2, 9), (2, 2, 6), (2, 3, 16), (3, 3, 40), (3, 3, 30)),
            True,
        ),
        "survo": (
            numbers.make_survo,
            numbers.check_survo,
            ((3, 2, 1), (3, 3, 3), (3, 3, 2), (4, 3, 5), (4, 3, 3)),
            True,
        ),
        "water_jugs": (
            moves.make_water_jugs,
            moves.check_water_jugs,
            ((2, 2), (2, 4), (3, 4), (3, 5), (3, 6)),
            False,
        ),
        "word_sorting": (logic.make_word_sorting, logic.check_word_sorting, ((4,), (7,), (11,), (16,), (25,)), True),
        "zebra": (logic.make_zebra, logic.check_zebra, ((3, 2), (3, 3), (4, 2), (4, 3), (4, 4)), True),
    }.items()
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
