"""Long texts of one thing again and again, as models in trouble write them: none may stop a verifier."""

import json
import time
from pathlib import Path

import pytest
from audit import completion

from lightning_jax.rewards import FormatReward, gsm8k_reward, puzzle_reward
from lightning_jax.rewards.answers import final_part, math_answer
from lightning_jax.rewards.code import python_code
from lightning_jax.rewards.ifeval import CONSTRAINTS, follows
from lightning_jax.rewards.puzzles import FAMILIES, make_puzzle
from lightning_jax.rewards.tulu3_ifeval import FUNCTIONS

LENGTH, SECONDS = 60_000, 2.0
PIECES = (
    *" \n\t*-#<>[]{}()$\\.,1a'\"`:",
    r"\boxed{",
    r"\boxed ",
    "final answer is ",
    "<think>",
    "</think>",
    "<answer>",
    "```python\n",
    "\n\n",
    "* ",
    "\n-",
    "<<",
    "[a",
    "***",
    "1.",
    "1,000",
    "A: ",
    "Mr. ",
    "def f(",
)
TEXTS = [piece * (LENGTH // len(piece)) + end for piece in PIECES for end in ("", "x")]
GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "ifeval.json").read_text(encoding="utf-8"))
LANGUAGE = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}


def assert_quick(verifier):
    for text in TEXTS:
        begin = time.process_time()
        verifier(text)
        assert time.process_time() - begin < SECONDS, f"{text[:20]!r}..."


def test_answers_are_found_quickly():
    assert_quick(math_answer)
    assert_quick(final_part)
    assert_quick(python_code)


def test_rewards_without_processes_are_quick():
    form = FormatReward(think_is_open=False, answer_tags=True)
    assert_quick(lambda text: form([completion(text)]))
    assert_quick(lambda text: gsm8k_reward([completion(text, ground_truth="1")]))


def test_constraints_are_checked_quickly():
    arguments = {constraint: given for constraint, _, given, _ in GOLDEN}
    for constraint in CONSTRAINTS.keys() - LANGUAGE:  # languages are told by another library, in its own time
        assert_quick(lambda text, constraint=constraint: follows(text, constraint, arguments[constraint]))


def test_tulu3s_constraints_are_checked_quickly():
    for name in ("validate_placeholders", "verify_bullet_points", "validate_highlighted_sections"):
        assert_quick(lambda text, name=name: FUNCTIONS[name](text, N=1))
    for name in ("validate_title", "validate_two_responses", "validate_json_format"):
        assert_quick(FUNCTIONS[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_puzzles_refuse_quickly(name):
    data = make_puzzle(name, 3, 0).data
    begin = time.process_time()
    completions = [completion(text[:9_000], family=name, ground_truth=data) for text in TEXTS]
    assert all(each.score == 0 for each in puzzle_reward(completions))
    assert time.process_time() - begin < SECONDS
