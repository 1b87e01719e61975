"""Rewards that like length are found out."""

import dataclasses
import random

import pytest
from audit import completion

from lightning_jax.rewards import LengthBias, Reward, padding_gain


def batch(rng: random.Random, prompts: int = 8, each: int = 8):
    """Completions of several prompts, of which some have all long answers."""
    for prompt in range(prompts):
        for _ in range(each):
            text = "x" * rng.randint(1, 50) * (1 + 10 * (prompt % 2))
            yield dataclasses.replace(
                completion(text, prompt=prompt), prompt=[{"role": "user", "content": str(prompt)}]
            )


def likes_length(completions):
    return [Reward(float(each.tokens), "") for each in completions]


def likes_nothing(completions):
    rng = random.Random(1)
    return [Reward(rng.random(), "") for _ in completions]


def likes_hard_prompts(completions):
    """Whose answers are long; among answers of one prompt it likes the short ones a little."""
    return [Reward(each.record["prompt"] % 2 * 10 - each.tokens / 1000, "") for each in completions]


@pytest.mark.parametrize(
    ("reward", "low", "high"), [(likes_length, 0.5, 1), (likes_nothing, -0.4, 0.4), (likes_hard_prompts, -1, -0.5)]
)
def test_correlation_is_among_completions_of_a_prompt(reward, low, high):
    watched = LengthBias(reward, window=256, alarm=0.45, say=lambda line: None)
    watched(list(batch(random.Random(0))))
    assert low <= watched.correlation <= high


def test_the_alarm_is_given_once_each_time():
    said = []
    rewards = {"now": likes_length}
    watched = LengthBias(lambda each: rewards["now"](each), window=64, alarm=0.4, say=said.append)
    for now in (likes_length, likes_length, likes_nothing, likes_nothing, likes_length):
        rewards["now"] = now
        watched(list(batch(random.Random(0))))
    assert len(said) == 2
    assert said[0].startswith("the reward likes length: correlation 0.")


def test_too_few_or_equal_completions_say_nothing():
    watched = LengthBias(lambda each: [Reward(1.0, "") for _ in each], window=64, alarm=0.1, say=pytest.fail)
    watched(list(batch(random.Random(0), prompts=1)))
    assert watched.correlation is None
    watched(list(batch(random.Random(0))))
    assert watched.correlation is None


def test_rewards_pass_unchanged_and_infra_errors_are_left_out():
    def half(completions):
        return [Reward.infra("away") if i % 2 else Reward(1.0, "") for i, _ in enumerate(completions)]

    completions = list(batch(random.Random(0)))
    assert LengthBias(half, window=64, alarm=0.1, say=pytest.fail)(completions) == half(completions)


def test_padding_gain_is_what_padding_earns():
    def by_text(completions):
        return [Reward(float("filler" in each.text), "") for each in completions]

    assert padding_gain(by_text, [completion("a"), completion("filler b")], "filler") == 0.5
    assert padding_gain(lambda each: [Reward(1.0, "") for _ in each], [completion("a")], "filler") == 0
