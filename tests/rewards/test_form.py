"""The form of completions, scores of a reward model, other scales."""

import dataclasses

import numpy as np
import pytest
from audit import assert_audited, completion

from lightning_jax.rewards import FormatReward, Rescaled, Reward, RewardModelReward


def test_thinking_and_an_answer_are_audited():
    assert_audited(
        FormatReward(think_is_open=False, answer_tags=False),
        {},
        gold=["<think>a</think>b", " <think>\na\n</think>\n\nb"],
        wrong=["<think>a</think>", "a</think>b", "<think>a", "x<think>a</think>b", "<think>a</think>b</think>c"],
    )


def test_thinking_that_the_prompt_opens_is_audited():
    reward = FormatReward(think_is_open=True, answer_tags=False)
    assert_audited(reward, {}, gold=["a</think>b"], wrong=["<think>a</think>b", "a", "</think>"])


def test_answers_in_tags_are_audited():
    assert_audited(
        FormatReward(think_is_open=False, answer_tags=True),
        {},
        gold=["<think>a</think><answer>b</answer>", "<think>a</think>\n<answer>\nb\n</answer>"],
        wrong=[
            "<think>a</think>b",
            "<think>a</think><answer></answer>",
            "<think>a</think><answer>b</answer>c",
            "<think>a</think>c<answer>b</answer>",
            "<think><answer>b</answer></think><answer>b</answer>",
        ],
    )


def test_what_is_cut_is_not_in_form():
    cut = dataclasses.replace(completion("<think>a</think>b"), finished=False)
    assert FormatReward(think_is_open=False, answer_tags=False)([cut])[0].score == 0


def test_a_reward_model_scores_the_chat_with_its_last_message():
    class Model:
        def scores(self, chats):
            self.chats = chats
            return np.array([0.5] * len(chats), np.float32)

    model = Model()
    assert [each.score for each in RewardModelReward(model)([completion("a")])] == [0.5]
    assert model.chats == [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]]
    assert RewardModelReward(model)([]) == []


@pytest.mark.parametrize(("score", "rescaled"), [(3.0, 0.5), (9.0, 1.0), (-9.0, -1.0)])
def test_rescaled_scores_stay_in_their_bounds(score, rescaled):
    reward = Rescaled(lambda each: [Reward(score, "raw")], shift=2, scale=2, low=-1, high=1)
    (result,) = reward([completion("a")])
    assert (result.score, result.parts["unscaled"].score) == (rescaled, score)


def test_what_has_no_score_has_none_on_any_scale():
    reward = Rescaled(lambda each: [Reward.infra("away")], shift=0, scale=2, low=-1, high=1)
    assert reward([completion("a")])[0].infra_error
