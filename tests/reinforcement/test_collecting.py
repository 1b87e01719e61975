"""Dynamic sampling refills, gives up and says so; what is measured is not what was selected."""

import dataclasses
import itertools
import time
import types

import numpy as np
import pytest

from lightning_jax.config import MixtureConfig
from lightning_jax.config_reader import parse
from lightning_jax.generation import Completion
from lightning_jax.input_pipeline.prompts import Prompt, Prompts
from lightning_jax.input_pipeline.sources import RecordReport
from lightning_jax.objectives import algorithms
from lightning_jax.objectives.policy_gradient import ADVANTAGES, RECORDED, REFERENCE
from lightning_jax.reinforcement.collecting import Collector
from lightning_jax.reinforcement.config import ReinforcementConfig, RewardConfig, RolloutConfig
from lightning_jax.reinforcement.generated import Generated
from lightning_jax.reinforcement.recipes import group_relative, rewards, rollouts
from lightning_jax.reinforcement.sampling_policy import Position
from lightning_jax.reinforcement.scoring import Scorer
from lightning_jax.rewards.reward import Reward

NUM_PROMPTS, SAMPLES, UPDATES, ROWS, LENGTH = 12, 2, 2, 4, 16
ROLLOUTS = RolloutConfig(**rollouts(samples=SAMPLES, updates=UPDATES, max_new_tokens=8, slots=4, dynamic_sampling=True))
SETTINGS = ReinforcementConfig(
    policy_gradient=algorithms.cispo(),
    advantages=group_relative(),
    value=None,
    rollouts=dataclasses.replace(ROLLOUTS, max_refills=2),
    rewards=RewardConfig(**rewards()),
)
PROMPTS = Prompts(
    "digits",
    0,
    tuple(Prompt((1, number + 2), ({"role": "user", "content": str(number)},), {}) for number in range(NUM_PROMPTS)),
    (),
    RecordReport(),
)


class Programs:
    """Whose trainer is `gap` nats away from what made the rollouts."""

    def __init__(self, gap=0.0):
        self.gap = gap

    def policy_log_prob_step(self, stage):
        return None

    def weights(self, params):
        return params

    def by_rows(self, stage, step, weights, rows):
        if weights == "reference":
            return rows[RECORDED] - 0.5
        sign = np.where(np.arange(rows[RECORDED].size).reshape(rows[RECORDED].shape) % 2, 1, -1)
        return rows[RECORDED] + self.gap * sign


def by_text(completions):
    return [Reward(float(each.text == "right"), each.text) for each in completions]


def collector(settings=SETTINGS, *, hopeless=(), programs=None, seed=0, reward=by_text):
    """A policy whose first completion of a prompt is right and whose second is wrong, but for hopeless prompts.

    With the trainer that scores it.
    """

    stage = types.SimpleNamespace(
        name="rl",
        config=types.SimpleNamespace(
            reinforcement=settings,
            context_length=LENGTH,
            mixture=MixtureConfig(start={"digits": 1.0}, end={"digits": 1.0}, packing="one_per_row"),
            rope_theta=1e4,
        ),
        batch_sizes=types.SimpleNamespace(rows=lambda step: ROWS, num_steps=8),
    )
    tokenizer = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))

    config = types.SimpleNamespace(seed=seed)
    rng = np.random.default_rng(0)

    def completions(prompts, *, limit, seed):
        return [
            [
                Completion(
                    place,
                    sample,
                    [5] * (sample + 2),
                    (-rng.exponential(1.0, sample + 2)).tolist(),
                    "stop",
                    "right" if sample == 0 and prompt.ids[1] - 2 not in hopeless else "wrong",
                )
                for sample in range(SAMPLES)
            ]
            for place, prompt in enumerate(prompts)
        ]

    generator = types.SimpleNamespace(completions=completions)
    made = Collector(config, stage, {"digits": PROMPTS}, tokenizer, generator, reward)
    return made, Scorer(stage, programs or Programs())


def collect(collector_and_scorer, generation=0, prompts=0, reference=None):
    """A generation that begins after so many prompts."""
    collector, scorer = collector_and_scorer
    generated = collector.generate(generation, Position(prompts=prompts))
    return scorer.collected(generation, generated, "policy", reference)


def asked(rows):
    """The prompts of the rows, one of each group."""
    return (rows["inputs"][::SAMPLES, 1] - 2).tolist()


def test_there_is_no_setting_that_cuts_the_distribution():
    given = rollouts(samples=2, updates=2, max_new_tokens=8, slots=4, dynamic_sampling=True)
    for name in ("top_p", "top_k"):
        _, problems = parse(RolloutConfig, given | {name: 0.9})
        assert [problem.partition(";")[0] for problem in problems] == [f"config.{name}: no such field"]


def test_a_generation_has_rows_for_all_updates_with_advantages_of_groups():
    collected = collect(collector())
    assert collected.rows["inputs"].shape == (UPDATES * ROWS, LENGTH)
    assert collected.metrics["prompts"] == UPDATES * ROWS // SAMPLES
    first, second = (collected.rows[ADVANTAGES][row].sum() for row in (0, 1))
    assert first == pytest.approx(2 * 0.7071, rel=1e-3)
    assert second == pytest.approx(3 * -0.7071, rel=1e-3)
    assert collected.metrics["reward"] == 0.5
    assert collected.metrics["completion_tokens"] == 2.5
    assert collected.metrics["padding_share"] == pytest.approx(1 - (2 + 2.5 - 1) / LENGTH)
    assert not collected.warnings


def test_prompts_with_equal_rewards_are_replaced_by_the_next_ones():
    order = asked(collect(collector()).rows) + asked(collect(collector(), 1, 4).rows)
    collected = collect(collector(hopeless=order[1:3]))
    assert asked(collected.rows) == [order[0], order[3], order[4], order[5]]
    assert (collected.metrics["prompts"], collected.metrics["refills"]) == (6, 1)
    assert collected.rows["loss_mask"].any(axis=1).all()
    assert collected.metrics["reward"] == 0.25  # of the first four prompts, whatever was put in their place
    assert collected.metrics["equal_reward_groups"] == 0.5


def test_tokens_per_second_count_those_of_refills(monkeypatch):
    """Four prompts, and two in place of those that are hopeless: two and three tokens of each."""
    order = asked(collect(collector()).rows)
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    timing = collect(collector(hopeless=order[1:3])).timing
    assert timing["generation_seconds"] == timing["reward_seconds"] == 2  # one each time
    assert timing["generated_tokens_per_second"] == timing["rewarded_tokens_per_second"] == (4 + 2) * (2 + 3) / 2


def test_refills_end_and_what_teaches_nothing_counts_nowhere():
    order = asked(collect(collector()).rows)
    collected = collect(collector(hopeless=set(range(NUM_PROMPTS)) - {order[0]}))
    assert collected.metrics["refills"] == 2
    assert collected.metrics["prompts"] == 4 + 3 + 3
    assert collected.rows["loss_mask"].any(axis=1).tolist() == [True] * 2 + [False] * 6
    (warning,) = collected.warnings
    assert "after 2 refills 3 of 4 prompts still have completions of equal reward" in warning


def test_without_dynamic_sampling_every_completion_counts():
    settings = dataclasses.replace(
        SETTINGS, rollouts=dataclasses.replace(ROLLOUTS, dynamic_sampling=False, max_refills=0)
    )
    collected = collect(collector(settings, hopeless=range(NUM_PROMPTS)))
    assert collected.rows["loss_mask"].any(axis=1).all()
    assert not collected.rows[ADVANTAGES].any()
    assert (collected.metrics["prompts"], collected.warnings) == (4, [])


def test_every_pass_asks_every_prompt_once_and_the_seed_decides_the_order():
    prompts = [asked(collect(collector(), generation, 4 * generation).rows) for generation in range(3)]
    assert sorted(np.concatenate(prompts)) == list(range(NUM_PROMPTS))
    assert asked(collect(collector(seed=1)).rows) != prompts[0]


def test_the_divergence_in_the_reward_is_taken_off_by_the_token():
    policy_gradient = dataclasses.replace(
        SETTINGS.policy_gradient, kl_coefficient=0.1, kl_in="reward", kl_estimator="k1"
    )
    advantages = group_relative(std="none")
    settings = dataclasses.replace(SETTINGS, policy_gradient=policy_gradient, advantages=advantages)
    rows = collect(collector(settings), reference="reference").rows
    # 1 - 0.1 * 0.5 * 2 tokens against 0 - 0.1 * 0.5 * 3 tokens.
    np.testing.assert_allclose(rows[ADVANTAGES][0][rows["loss_mask"][0]], (0.9 + 0.15) / 2, rtol=1e-5)
    assert REFERENCE in rows


def test_an_alarm_is_raised_where_rollouts_and_trainer_disagree():
    assert not collect(collector()).warnings
    collected = collect(collector(programs=Programs(gap=1.0)))
    (warning,) = collected.warnings
    assert "probabilities of rollouts and trainer correlate by 0." in warning
    assert collected.metrics["probability_correlation"] < 0.99


def test_samples_say_what_they_were_worth_and_why():
    settings = dataclasses.replace(SETTINGS, rollouts=dataclasses.replace(ROLLOUTS, logged_prompts=2))
    samples = collect(collector(settings)).samples
    assert len(samples) == 2 * SAMPLES
    assert (samples[0]["reward"], samples[0]["reason"], samples[0]["text"]) == (1.0, "right", "right")
    assert samples[1]["advantage"] == pytest.approx(-0.7071, rel=1e-3)


def test_what_was_generated_is_the_same_from_its_file():
    made, scorer = collector()
    generated = made.generate(0, Position())
    again = Generated.of_arrays(generated.arrays())
    collected, expected = (scorer.collected(0, each, "policy") for each in (again, generated))
    assert collected.metrics == expected.metrics
    assert collected.samples == expected.samples
    assert collected.rows.keys() == expected.rows.keys()
    for name, array in expected.rows.items():
        np.testing.assert_array_equal(collected.rows[name], array)
    assert again.position == generated.position


def test_a_reward_that_likes_length_is_told():
    """The second completion of each prompt is the longer one."""
    rows = dataclasses.replace(SETTINGS.rollouts, updates=16, dynamic_sampling=False, max_refills=0)
    settings = dataclasses.replace(SETTINGS, rollouts=rows)
    likes_short = collect(collector(settings))
    assert likes_short.metrics["length_correlation"] == pytest.approx(-1)
    assert not likes_short.warnings
    likes_long = collect(collector(settings, reward=lambda all: [Reward(float(each.tokens), "long") for each in all]))
    assert likes_long.metrics["length_correlation"] == pytest.approx(1)
    assert "the reward likes length: among a prompt's completions they correlate by 1.00" in likes_long.warnings[0]


def test_perplexity_is_that_of_the_tokens_that_were_drawn():
    made, _ = collector()
    generated = made.generate(0, Position())
    log_probs = generated.rows[RECORDED][generated.rows["loss_mask"]]
    assert generated.metrics["perplexity"] == pytest.approx(np.exp(-log_probs.mean()), rel=1e-6)


def test_lengths_and_curriculum_go_on_from_the_position():
    lengths = {"limits": (4, 8), "window": 1, "perplexity_change": 9.0, "length_share": 0.7}
    more = {"lengths": lengths, "curriculum": {"start": (0.0, 0.4), "end": (0.0, 0.4), "passing_reward": 1.0}}
    plain = rollouts(samples=SAMPLES, updates=UPDATES, max_new_tokens=8, slots=4, dynamic_sampling=False, **more)
    (config, problems) = parse(RolloutConfig, plain)
    assert not problems
    made, _ = collector(dataclasses.replace(SETTINGS, rollouts=config), hopeless=range(6))
    position, limits, prompts = Position(), [], []
    for generation in range(4):
        limits.append(made.sampling_policy.limit(position))
        generated = made.generate(generation, position)
        assert generated.metrics["max_new_tokens"] == limits[-1]
        prompts.append(asked(generated.rows))
        position = generated.position
    assert limits == [4, 4, 8, 8]  # after two generations there is something to compare
    assert sorted(np.concatenate(prompts[:3])) == list(range(NUM_PROMPTS))
    assert set(prompts[3]) <= set(range(6))  # the others are right half of the time, which is too often
