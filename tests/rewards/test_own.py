"""A reward of the user's own, and what is said where it is mistaken."""

import numpy as np
import pytest
from audit import completion

from lightning_jax.errors import UserError
from lightning_jax.rewards import OwnReward, Reward

COMPLETIONS = [completion("a"), completion("bb")]


def test_numbers_and_rewards_are_rewards():
    def reward(completions):
        return [np.float32(len(completions)), Reward.infra("away")]

    number, failed = OwnReward("mine:reward", reward)(COMPLETIONS)
    assert (number.score, failed.infra_error) == (2.0, True)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda completions: [1 / 0 for _ in completions],
            r"ZeroDivisionError: division by zero \(.*test_own.py, line",
        ),
        (lambda completions: [1.0], "1 rewards for 2 completions"),
        (lambda completions: ["good", "bad"], "'good' is neither; a number or a Reward for each completion"),
        (lambda completions: [float("nan"), 1.0], "finite number, not nan"),
        (lambda completions: None, "'NoneType' object is not iterable; a number or a Reward"),
    ],
)
def test_a_mistake_in_it_is_one_line(reward, message):
    with pytest.raises(UserError, match=f"^rewards.weights.mine:reward: .*{message}") as caught:
        OwnReward("mine:reward", reward)(COMPLETIONS)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_imported_is_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "my_broken_rewards.py").write_text("def brevity(:")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("no_such_module:brevity", "ModuleNotFoundError: No module named 'no_such_module'$"),
        ("json:brevity", "AttributeError: module 'json' has no attribute 'brevity'$"),
        ("my_broken_rewards:brevity", "SyntaxError: invalid syntax"),
    ):
        with pytest.raises(UserError, match=f"^rewards.weights.{name}: {message}"):
            OwnReward.of(name)


def test_a_mistake_of_a_record_keeps_its_own_line():
    def reward(completions):
        raise UserError("a record without ground_truth")

    with pytest.raises(UserError, match=r"^a record without ground_truth$"):
        OwnReward("mine:reward", reward)(COMPLETIONS)
