"""Scores: what the end of a completion costs, and that a verifier's failure is no wrong answer."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import tiny_judge

from lightning_jax.config_reader import parse
from lightning_jax.errors import UserError
from lightning_jax.generation import Completion
from lightning_jax.input_pipeline.prompts import Prompt
from lightning_jax.reinforcement.config import RewardConfig
from lightning_jax.reinforcement.grading import grade, open_rewards, shaped, ungraded, verify
from lightning_jax.reinforcement.recipes import rewards
from lightning_jax.rewards.isolation import WAYS_OUT
from lightning_jax.rewards.reward import Reward

PLAIN = RewardConfig(**rewards(gsm8k=1.0))
PROMPT = Prompt(ids=(1, 2), chat=({"role": "user", "content": "1 + 1?"},), record={"ground_truth": "2"})


def completion(text: str, tokens: int = 3, reason: str = "stop", sample: int = 0) -> Completion:
    return Completion(0, sample, [5] * tokens, [-1.0] * tokens, reason, text)


def changed(**fields) -> RewardConfig:
    return dataclasses.replace(PLAIN, **fields)


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
        function = open_rewards(PLAIN, stack, print)
        groups = [[completion("#### 2"), completion("#### 3", sample=1)], [completion("two"), completion("2")]]
        grades = grade(verify(function, [PROMPT, PROMPT], groups), PLAIN, groups, max_new_tokens=9)
    np.testing.assert_array_equal(grades.reward_PG, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(grades.score_PG, grades.reward_PG)
    assert "3 ≠ 2" in grades.reasons[0][1]


def test_what_no_verifier_could_grade_has_no_score_and_is_said():
    def away(completions):
        return [Reward.infra("endpoint away") if each.text == "2" else Reward(1.0, "") for each in completions]

    config = changed(overlong_buffer=4)
    groups = [[completion("2", tokens=8), completion("3", tokens=4)]]
    grades = grade(verify(away, [PROMPT], groups), config, groups, max_new_tokens=8)
    np.testing.assert_array_equal(grades.reward_PG, [[math.nan, 1]])
    np.testing.assert_array_equal(grades.score_PG, [[math.nan, 1]])
    assert grades.reasons == [["endpoint away", ""]]
    assert ungraded(grades) == "1 of 2 completions have no reward: endpoint away"
    alone = [group[:1] for group in groups]
    with pytest.raises(UserError, match="no verifier could grade any of 1 completions: endpoint away"):
        ungraded(grade(verify(away, [PROMPT], alone), config, alone, max_new_tokens=8))


def test_a_function_of_the_users_own_is_a_reward(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(completions):\n    return [-each.tokens for each in completions]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = RewardConfig(**rewards(**{"my_rewards:brevity": 0.5, "gsm8k": 1.0}))
    with contextlib.ExitStack() as stack:
        verdicts = verify(open_rewards(config, stack, print), [PROMPT], [[completion("2"), completion("3", tokens=8)]])
    np.testing.assert_array_equal(verdicts.reward_N, [1 - 1.5, -4])


def test_a_reward_that_there_is_not_is_told():
    with pytest.raises(UserError, match=r"rewards.weights.gsm8q: no such reward; did you mean 'gsm8k'\?"):
        open_rewards(RewardConfig(**rewards(gsm8q=1.0)), contextlib.ExitStack(), print)


def test_a_judge_behind_an_endpoint_is_a_reward(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    right, wrong = completion("two: 2"), completion("three")
    with (
        tiny_judge.serving(lambda response: 5 if "2" in response else 1, key="secret") as judge,
        contextlib.ExitStack() as stack,
    ):
        config, problems = parse(RewardConfig, rewards(graded_judge=10.0, judge=judge))
        assert not problems
        function = open_rewards(config, stack, print)
        verdicts = verify(function, [PROMPT], [[right, wrong]])
    grades = grade(verdicts, config, [[right, wrong]], max_new_tokens=9)
    np.testing.assert_array_equal(grades.reward_PG, [[10, 0]])
    assert "grade 5 of 5" in grades.reasons[0][0]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="JUDGE_KEY is not set in the environment"):
        open_rewards(config, contextlib.ExitStack(), print)


def test_rewards_say_what_they_need():
    _, problems = parse(RewardConfig, rewards(graded_judge=1.0))
    assert problems == ["config.judge: weights.graded_judge needs this section"]
    _, problems = parse(RewardConfig, rewards(reward_model=1.0))
    assert problems == ["config.reward_model: weights.reward_model needs this section"]
    use = {"folder": "/nowhere", "shift": 0.0, "scale": 1.0, "low": -5.0, "high": 5.0}
    config, _ = parse(RewardConfig, rewards(reward_model=1.0, model=use))
    with pytest.raises(UserError, match="/nowhere"):
        open_rewards(config, contextlib.ExitStack(), print)


def test_code_runs_outside_of_a_sandbox_only_where_the_config_says_so(monkeypatch):
    def missing():
        raise UserError(f"no sandbox here: {WAYS_OUT}")

    monkeypatch.setattr("lightning_jax.rewards.sandbox.require_isolation", missing)
    config = RewardConfig(**rewards(code=1.0))
    with contextlib.ExitStack() as stack:
        with pytest.raises(UserError, match=r"rewards.unsafe_code=true"):
            open_rewards(config, stack, print)
        function = open_rewards(dataclasses.replace(config, unsafe_code=True), stack, print)
        assert function.rewards["code"][1].sandbox.unsafe
