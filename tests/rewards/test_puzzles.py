"""Every family of puzzles: its verifier audited, its solutions counted by brute force."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from audit import assert_audited, completion

from lightning_jax import rewards
from lightning_jax.errors import UserError
from lightning_jax.rewards.puzzles import FAMILIES, LEVELS, make_puzzle, puzzle_records, puzzle_reward
from lightning_jax.rewards.puzzles.__main__ import main
from lightning_jax.rewards.puzzles.core import solutions
from lightning_jax.rewards.puzzles.numbers import evaluate

UNIQUE = [name for name, family in FAMILIES.items() if family.unique]
GRIDS = {  # those whose level 1 has few enough grids to try them all: the values of a cell, and the number of cells
    "binairo": (".X", 16),
    "calcudoku": ("123", 9),
    "campsite": (".X", 16),
    "futoshiki": ("123", 9),
    "kakurasu": (".X", 9),
    "minesweeper": (".X", 9),
    "nonogram": (".X", 9),
    "norinori": (".X", 16),
    "number_wall": (".X", 16),
    "skyscrapers": ("123", 9),
    "star_placement": (".X", 16),
}


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_verifier_is_audited(name, level):
    for seed in range(3):
        puzzle = make_puzzle(name, level, seed)
        gold = [f"<answer>{puzzle.solution}</answer>", f"<think>x</think>So: <answer>\n{puzzle.solution}\n</answer>."]
        wrong = [f"<answer>{puzzle.solution}</answer> <answer>no</answer>", puzzle.prompt, puzzle.solution * 2]
        assert_audited(puzzle_reward, {"family": name, "ground_truth": puzzle.data}, gold, wrong)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_constant_answer_solves_many(name):
    puzzles = [make_puzzle(name, 3, seed) for seed in range(12)]
    family = FAMILIES[name]
    for constant in {puzzle.solution for puzzle in puzzles}:
        assert sum(family.accepts(puzzle.data, constant) for puzzle in puzzles) <= 3


@pytest.mark.parametrize("name", UNIQUE)
def test_a_changed_solution_is_wrong(name):
    rng = random.Random(0)
    for seed in range(4):
        puzzle = make_puzzle(name, 2, seed)
        for _ in range(10):
            place = rng.choice([i for i, each in enumerate(puzzle.solution) if not each.isspace() and each not in ",:"])
            changed = puzzle.solution[:place] + rng.choice("019Xza.") + puzzle.solution[place + 1 :]
            assert FAMILIES[name].accepts(puzzle.data, changed) == (changed == puzzle.solution)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_no_other_grid_of_all_is_a_solution(name):
    values, cells = GRIDS[name]
    width = {9: 3, 16: 4}[cells]
    puzzle = make_puzzle(name, 1, 0)
    accepted = 0
    for grid in itertools.product(values, repeat=cells):
        rows = "\n".join(" ".join(grid[start : start + width]) for start in range(0, cells, width))
        accepted += FAMILIES[name].accepts(puzzle.data, rows)
    assert accepted == 1


@pytest.mark.parametrize("seed", range(5))
def test_knights_and_knaves_have_one_world(seed):
    data = make_puzzle("knights_and_knaves", 5, seed).data
    worlds = itertools.product(("knight", "knave"), repeat=len(data["names"]))
    answers = ("\n".join(map(": ".join, zip(data["names"], world, strict=True))) for world in worlds)
    assert sum(FAMILIES["knights_and_knaves"].accepts(data, answer) for answer in answers) == 1


@pytest.mark.parametrize("seed", range(3))
def test_zebra_has_one_world(seed):
    data = make_puzzle("zebra", 2, seed).data
    orders = itertools.product(*(itertools.permutations(row) for row in data["values"]))
    answers = (
        "\n".join(f"{i + 1}: {', '.join(each)}" for i, each in enumerate(zip(*rows, strict=True))) for rows in orders
    )
    assert sum(FAMILIES["zebra"].accepts(data, answer) for answer in answers) == 1


@pytest.mark.parametrize("name", ["survo", "cryptarithm"])
def test_no_other_order_of_numbers_is_a_solution(name):
    data = make_puzzle(name, 1, 0).data
    if name == "survo":
        answers = (f"{a} {b} {c}\n{d} {e} {f}" for a, b, c, d, e, f in itertools.permutations(range(1, 7)))
    else:
        letters = sorted(set("".join(data["words"])))
        orders = itertools.permutations(range(10), len(letters))
        answers = ("\n".join(f"{a}: {b}" for a, b in zip(letters, order, strict=True)) for order in orders)
    assert sum(FAMILIES[name].accepts(data, answer) for answer in answers) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_puzzles_depend_on_their_seed_alone_and_are_json(name):
    puzzle = make_puzzle(name, 2, 7)
    assert make_puzzle(name, 2, 7) == puzzle
    assert json.loads(json.dumps(puzzle.data)) == puzzle.data
    assert len({make_puzzle(name, 3, seed).prompt for seed in range(5)}) == 5
    assert len(FAMILIES[name].levels) == LEVELS


@pytest.mark.parametrize("name", [name for name in UNIQUE if "given" in make_puzzle(name, 1, 0).data])
def test_not_all_is_given_away(name):
    for level in range(1, LEVELS):
        hidden = [make_puzzle(name, level, seed).data["given"].count(None) for seed in range(3)]
        assert min(hidden) >= 3


@pytest.mark.parametrize(
    "answer",
    [
        "24",
        "4!",
        "2**3*3",
        "6*4+0",
        "(6,4)",
        "６*4",
        "6*4*1_0/10",
        "__import__('os')",
        "6*4/(1-1)",
        "6*4;1",
        "0x18",
        "(",
    ],
)
def test_what_is_no_expression_of_the_numbers_makes_no_24(answer):
    assert not FAMILIES["game_of_24"].accepts({"numbers": [6, 4]}, answer)
    assert FAMILIES["game_of_24"].accepts({"numbers": [6, 4]}, " 4 *(6) ")


def test_expressions_are_computed_without_rounding():
    assert evaluate("1/3 + 1/3 + 1/3")[0] == 1


def test_any_solution_is_accepted():
    data = {"numbers": [3, 3, 8, 8]}
    assert FAMILIES["game_of_24"].accepts(data, "8/(3-8/3)")
    hanoi = make_puzzle("hanoi", 1, 0).data | {"pegs": [[2, 1], [], []], "most": 5}
    assert FAMILIES["hanoi"].accepts(hanoi, "AB AC BC")
    assert FAMILIES["hanoi"].accepts(hanoi, "AC CB AC BC")
    assert not FAMILIES["hanoi"].accepts(hanoi, "AC AC")


def test_the_solver_finds_all_solutions():
    def apart(values, row):
        return all(
            other is None or each == row or abs(other - values[row]) != abs(each - row)
            for each, other in enumerate(values)
        )

    assert len(list(solutions([range(6)] * 6, [range(6)], apart))) == 4  # queens
    rows = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert len({tuple(each) for each in solutions([range(3)] * 9, rows)}) == 12  # Latin squares


def test_records_go_round_families_and_levels():
    records = list(itertools.islice(puzzle_records([1, 2], 0, ("maze", "hanoi")), 6))
    assert [(each["family"], each["level"]) for each in records] == [
        ("maze", 1), ("hanoi", 1), ("maze", 2), ("hanoi", 2), ("maze", 1), ("hanoi", 1)
    ]  # fmt: skip
    assert records[0]["ground_truth"] != records[4]["ground_truth"]


def test_what_there_is_not_is_said_in_one_line():
    with pytest.raises(UserError, match="there is no family of puzzles 'chess'; there are binairo"):
        make_puzzle("chess", 1, 0)
    with pytest.raises(UserError, match="levels 1 to 5, not 6"):
        make_puzzle("maze", 6, 0)
    with pytest.raises(UserError, match="there is no family of puzzles 'chess'"):
        puzzle_reward([completion("", family="chess", ground_truth={})])


def test_the_readme_names_all_families_and_no_other():
    text = Path(rewards.__file__).with_name("README.md").read_text(encoding="utf-8")
    unique, several = (
        part.partition(".")[0]
        for part in re.split("with one solution:|with several, all of which are accepted:", text)[1:]
    )
    assert re.findall("[a-z_0-9]+", unique) == sorted(UNIQUE)
    assert re.findall("[a-z_0-9]+", several) == sorted(set(FAMILIES) - set(UNIQUE))


def test_the_command_writes_records(tmp_path, capsys):
    out = tmp_path / "puzzles.jsonl"
    assert main([f"--out={out}", "--count=3", "--levels=2", "--families=maze,zebra"]) == 0
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert records == list(itertools.islice(puzzle_records([2], 0, ("maze", "zebra")), 3))
    assert "3 puzzles of 2 families" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--families=sudoko", "--families: no family 'sudoko'; did you mean 'sudoku'?"),
        ("--levels=9", "--levels: '9' is none of 1, 2, 3, 4, 5"),
        ("--out=/no/such/folder", "--out=/no/such/folder: No such file or directory"),
    ],
)
def test_mistakes_in_the_command_are_one_line(argument, message, tmp_path, capsys):
    assert main([f"--out={tmp_path}/puzzles.jsonl", "--count=3", argument]) != 0
    assert capsys.readouterr().err == f"error: {message}\n"
