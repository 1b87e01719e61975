"""Answers found in completions."""

from decimal import Decimal

import pytest

from lightning_jax.rewards.answers import boxed, final_part, last_number, math_answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18 every day.\nA: 18", "18"),
        ("#### 70,000", "70000"),
        ("1,234,567.50 in all.", "1234567.5"),
        ("the set 1,2", "2"),  # only groups of three are thousands
        ("x = -3", "-3"),
        ("10-5", "5"),  # a minus, no sign
        ("it is .5", "0.5"),
        ("18.", "18"),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == Decimal(number)


def test_a_text_without_digits_has_no_number():
    assert last_number("eighteen") is None


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),  # what is cut off is no answer
        (r"\boxed 5$ and", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxedsomething{7}", None),
        (r"\boxed{\boxed{3}}", "3"),
    ],
)
def test_what_is_in_the_last_box(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The final answer is $3$. I hope it is correct. \boxed{4}", "4"),
        ("Final Answer: The final answer is $3$. I hope it is correct.", "3"),
        ("The final answer is 3.5.", "3.5"),
        ("first $a$\nthen $b$ and $c$", "c"),
        ("It costs $5 and then $7", None),
        ("$c$ above\nbut 4 below", None),
    ],
)
def test_math_answers_are_read_in_one_place(text, answer):
    assert math_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("<think>1</think> 2", "2"),
        ("<think>a</think>b</think> <answer> c </answer> d", "c"),
        ("<think> never ends 3", "<think> never ends 3"),
        ("<answer>1</answer><think></think>2", "2"),
    ],
)
def test_what_was_thought_is_no_answer(text, part):
    assert final_part(text) == part
