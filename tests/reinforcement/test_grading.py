"""Scores: what the end of a completion costs, and that a verifier's failure is no wrong answer."""

import contextlib
import math

import numpy as np
import pytest

from lightning_jax.errors import UserError
from lightning_jax.generation import Completion
from lightning_jax.input_pipeline.prompts import Prompt
from lightning_jax.reinforcement.config import RewardConfig
from lightning_jax.reinforcement.grading import grade, open_rewards, shaped
from lightning_jax.rewards.reward import Reward

PLAIN = RewardConfig(weights={"gsm8k": 1.0}, unfinished="keep", unfinished_score=0.0, overlong_buffer=0)
PROMPT = Prompt(ids=(1, 2), chat=({"role": "user", "content": "1 + 1?"},), record={"ground_truth": "2"})


def completion(text: str, tokens: int = 3, reason: str = "stop", sample: int = 0) -> Completion:
    return Completion(0, sample, [5] * tokens, [-1.0] * tokens, reason, text)


def changed(**fields) -> RewardConfig:
    return RewardConfig(**({"weights": {"gsm8k": 1.0}} | {"unfinished": "keep", "unfinished_score": 0.0} | fields))


def test_the_overlong_penalty_is_dapos_in_tokens_and_clipped():
    config = changed(overlong_buffer=4096)
    scores = [
        shaped(1.0, config, tokens, finished=True, max_new_tokens=20480)
        for tokens in (100, 16384, 16384 + 1024, 20480, 30000)
    ]
    np.testing.assert_allclose(scores, [1, 1, 0.75, 0, 0])


def test_an_unfinished_completions_score_is_replaced_or_lowered():
    for mode, expected in (("keep", 10.0), ("replace", -10.0), ("subtract", 20.0)):
        config = changed(unfinished=mode, unfinished_score=0.0 if mode == "keep" else -10.0, overlong_buffer=0)
        assert shaped(10.0, config, 5, finished=False, max_new_tokens=5) == expected
        assert shaped(10.0, config, 5, finished=True, max_new_tokens=5) == 10.0


def test_completions_of_a_prompt_are_graded_in_their_order_with_reasons():
    with contextlib.ExitStack() as stack:
        function = open_rewards(PLAIN, stack)
        groups = [[completion("#### 2"), completion("#### 3", sample=1)], [completion("two"), completion("2")]]
        grades = grade(function, PLAIN, [PROMPT, PROMPT], groups, max_new_tokens=9)
    np.testing.assert_array_equal(grades.reward_PG, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(grades.score_PG, grades.reward_PG)
    assert "3 ≠ 2" in grades.reasons[0][1]


def test_what_no_verifier_could_grade_has_no_score():
    def away(completions):
        return [Reward.infra("endpoint away")] * len(completions)

    config = changed(overlong_buffer=4)
    grades = grade(away, config, [PROMPT], [[completion("2", tokens=8)]], max_new_tokens=8)
    assert math.isnan(grades.reward_PG[0, 0])
    assert math.isnan(grades.score_PG[0, 0])
    assert grades.reasons == [["endpoint away"]]


def test_a_reward_that_there_is_not_is_told():
    with pytest.raises(UserError, match=r"rewards.weights.gsm8q: no such reward; did you mean 'gsm8k'\?"):
        open_rewards(RewardConfig({"gsm8q": 1.0}, "keep", 0.0, 0), contextlib.ExitStack())
