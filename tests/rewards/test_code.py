"""Rewards of code by its tests."""

from pathlib import Path

import pytest
from audit import assert_audited, completion
from sandboxes import isolated

from lightning_jax.errors import UserError
from lightning_jax.rewards import CodeReward
from lightning_jax.rewards.code import python_code

PROMPT = 'def largest(values: list[int]) -> int:\n    """The largest of some numbers."""\n'
RECORD = {
    "prompt": PROMPT,
    "entry_point": "largest",
    "test": "def check(candidate):\n    assert candidate([1, 3, 2]) == 3\n    assert candidate([-1]) == -1\n",
}
SORTING = {"inputs": ["3\n1\n2\n", "5\n"], "outputs": ["1\n2\n3\n", "5"]}


@pytest.fixture(scope="module")
def reward():
    return CodeReward(isolated())


@pytest.mark.slow
def test_unit_tests_are_audited(reward):
    assert_audited(
        reward,
        RECORD,
        gold=[
            "    return max(values)\n",
            PROMPT + "    return max(values)\n",
            "Easy:\n```python\ndef largest(values):\n    return sorted(values)[-1]\n```\nDone.",
        ],
        wrong=["    return 3\n", "    return values[0]\n", "```python\nreturn max(values)\n```", "max(values)"],
    )


@pytest.mark.slow
def test_programs_are_audited(reward):
    assert_audited(
        reward,
        SORTING,
        gold=["import sys\nprint(*sorted(map(int, sys.stdin)), sep='\\n')"],
        wrong=["print(1)\nprint(2)\nprint(3)", "import sys\nprint(*sys.stdin)", "print('1\\n2\\n3'); exit(0)"],
    )


def test_reasons_say_what_failed(reward):
    texts = [(RECORD, "    return 3\n"), (RECORD, "    while True: pass\n"), (SORTING, "1 / 0"), (SORTING, "print(5)")]
    rewards = reward([completion(text, **record) for record, text in texts])
    assert [each.reason for each in rewards] == [
        "test line 3: AssertionError: ",
        "out of time",
        "case 1: ZeroDivisionError: division by zero",
        "case 1: another output",
    ]


def test_a_sandbox_that_fails_is_an_infra_error(reward, monkeypatch):
    monkeypatch.setattr("lightning_jax.rewards.sandbox.interpreter", lambda: Path("/usr/bin/no_python"))
    rewards = reward([completion("    return max(values)\n", **RECORD), completion("1", **SORTING)])
    assert [each.infra_error for each in rewards] == [True, True]
    assert "no_python" in rewards[0].reason


def test_a_record_without_tests_is_said_in_one_line(reward):
    with pytest.raises(UserError, match=r"a record of code has `test` and `entry_point`.*; not ground_truth"):
        reward([completion("1", ground_truth="1")])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```\nor better\n```py\nb\n```", "b\n"),
        ("```\nc\n```", "c\n"),
        ("    return 1\n", "    return 1\n"),
        ("<think>```python\na\n```</think>d", "d"),
    ],
)
def test_the_code_is_the_last_block_or_all(text, code):
    assert python_code(text) == code
