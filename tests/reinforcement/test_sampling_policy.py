"""Prompts are chosen by their pass rates and limits of length raised, each as a function of the position alone."""

import numpy as np
import pytest

from lightning_jax.config import MixtureConfig
from lightning_jax.config_reader import parse
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline import Mixture
from lightning_jax.input_pipeline.prompts import Prompt, Prompts
from lightning_jax.input_pipeline.sources import RecordReport
from lightning_jax.reinforcement.config import LengthsConfig, RolloutConfig
from lightning_jax.reinforcement.recipes import rollouts
from lightning_jax.reinforcement.sampling_policy import Position, SamplingPolicy, ready

GENERATIONS = 11
EASY_FIRST = {"start": (0.5, 1.0), "end": (0.0, 0.5), "passing_reward": 1.0}
LENGTHS = {"limits": (40, 48, 56), "window": 2, "perplexity_change": 0.1, "length_share": 0.9}


def prompts(name: str, records: list[dict]) -> Prompts:
    train = tuple(Prompt((number,), (), record) for number, record in enumerate(records))
    return Prompts(name, 0, train, (), RecordReport())


def policy(corpora: dict[str, list[dict]], **more) -> SamplingPolicy:
    shares = dict.fromkeys(corpora, 1.0)
    mixture = Mixture(MixtureConfig(start=shares, end=shares, packing="one_per_row"), shares, 10_000, 0)
    given = rollouts(samples=4, updates=1, max_new_tokens=56, slots=4, dynamic_sampling=False, **more)
    config, problems = parse(RolloutConfig, given)
    assert not problems
    return SamplingPolicy(
        config, {name: prompts(name, each) for name, each in corpora.items()}, mixture, GENERATIONS, (0,)
    )


def drawn(made: SamplingPolicy, position: Position, generation: int, count: int):
    places, position, exceptions = made.draw(position, generation, count)
    return [place.index for place in places], position, exceptions


def test_without_curriculum_every_pass_asks_every_prompt_once():
    made = policy({"a": [{}] * 10})
    first, position, _ = drawn(made, Position(), 0, 4)
    rest, position, exceptions = drawn(made, position, 1, 6)
    assert sorted(first + rest) == list(range(10))
    assert (position.prompts, position.skipped, exceptions) == (10, {}, 0)


def test_a_sample_filter_leaves_out_what_is_never_or_nearly_always_right():
    """MiniMax-M1's: strictly between 0 and 0.9; a record that does not say its rate stays."""
    rates = [0.0, 0.1, 0.5, 0.89, 0.9, 1.0]
    made = policy({"a": [{"pass_rate": rate} for rate in rates] + [{}]}, sample_filter={"pass_rate": (0.0, 0.9)})
    assert made.sizes == {"a": 4}
    kept = {made.prompt(place).ids[0] for place in made.draw(Position(), 0, 4)[0]}
    assert kept == {1, 2, 3, 6}
    with pytest.raises(UserError, match=r"none of its 1 prompts has pass_rate between 0 and 0\.9; widen sample_filter"):
        policy({"a": [{"pass_rate": 1.0}]}, sample_filter={"pass_rate": (0.0, 0.9)})


def test_a_curriculum_moves_from_easy_to_hard_prompts_by_what_records_say():
    rates = np.linspace(0, 1, 41)
    made = policy({"a": [{"pass_rate": float(rate)} for rate in rates]}, curriculum=EASY_FIRST)
    position, means = Position(), []
    for generation in range(GENERATIONS):
        indices, position, exceptions = drawn(made, position, generation, 8)
        low = 0.5 - 0.05 * generation
        assert all(low - 1e-6 <= rates[index] <= low + 0.5 + 1e-6 for index in indices)
        assert not exceptions
        means.append(rates[indices].mean())
    assert means[0] > 0.6 > 0.4 > means[-1]


def test_a_measured_rate_replaces_what_a_record_says_and_counts_for_one_pass():
    made = policy({"a": [{}] * 6}, curriculum={"start": (0.3, 1.0), "end": (0.3, 1.0), "passing_reward": 1.0})
    indices, position, _ = drawn(made, Position(), 0, 6)
    places = made.draw(Position(), 0, 6)[0]
    hard = indices[:3]
    rewards = np.array([[0.0, 0.0, 0.0, 1.0] if place.index in hard else [1.0, 1.0, np.nan, 0.0] for place in places])
    position = made.seen(position, places, rewards)
    np.testing.assert_allclose(sorted(position.pass_rates["a"]), [0.25] * 3 + [2 / 3] * 3, rtol=1e-6)
    second, position, _ = drawn(made, position, 1, 3)  # one pass over six prompts, of which three are too hard
    assert sorted(second) == sorted(set(range(6)) - set(hard))
    assert position.skipped["a"] <= 3
    third, position, _ = drawn(made, position, 2, 6)
    assert set(hard) <= set(third)  # asked again


def test_what_others_are_passed_over_does_not_change_the_shares_of_corpora():
    corpora = {"a": [{"pass_rate": 0.9 * (number % 5 == 0)} for number in range(50)], "b": [{}] * 50}
    made = policy(corpora, curriculum={"start": (0.5, 1.0), "end": (0.5, 1.0), "passing_reward": 1.0})
    places, position, _ = made.draw(Position(), 0, 40)
    assert abs(sum(place.corpus == "a" for place in places) - 20) <= 1
    assert position.skipped["a"] > 20
    assert "b" not in position.skipped


def test_where_no_prompt_is_in_the_range_prompts_are_asked_in_their_turn():
    made = policy({"a": [{"pass_rate": 0.0}] * 5}, curriculum=EASY_FIRST)
    indices, position, exceptions = drawn(made, Position(), 0, 3)
    assert exceptions == 3
    assert len(set(indices)) == 3
    assert position.prompts == 3


def test_a_draw_in_parts_is_the_draw_as_a_whole():
    made = policy(
        {"a": [{"pass_rate": (number % 10) / 10} for number in range(40)], "b": [{}] * 7}, curriculum=EASY_FIRST
    )
    whole, after, _ = drawn(made, Position(), 3, 20)
    first, middle, _ = drawn(made, Position(), 3, 7)
    again = Position.of_arrays(middle.arrays())
    second, end, _ = drawn(made, again, 3, 13)
    assert first + second == whole
    assert end == after


def test_a_position_is_the_same_from_its_arrays():
    rates = {"a": np.array([0.5, np.nan], np.float32)}
    position = Position(7, {"a": 3}, 1, ((2.5, 40.0), (2.25, 39.0)), rates)
    again = Position.of_arrays(position.arrays() | {"inputs": np.zeros(3)})
    assert (again.prompts, again.skipped, again.length_stage, again.history) == (7, {"a": 3}, 1, position.history)
    np.testing.assert_array_equal(again.pass_rates["a"], rates["a"])


def test_a_limit_is_raised_when_perplexity_has_converged_and_completions_are_long():
    made = policy({"a": [{}]}, lengths=LENGTHS)
    position, limits = Position(), []
    for perplexity, longest in [(3.0, 40), (2.0, 40), (2.0, 40), (2.0, 40), (2.0, 40)]:
        position = made.measured(position, perplexity, longest)
        limits.append(made.limit(position))
    assert limits == [40, 40, 40, 40, 48]  # of the first four, the means of two are 2.5 and 2
    for longest in (48, 48, 30, 48, 48):
        position = made.measured(position, 2.0, longest)
        limits.append(made.limit(position))
    assert limits[5:] == [48, 48, 48, 48, 56]  # four make two means again, and 30 has to leave the last one
    assert made.measured(position, 2.0, 56) is position  # there is no longer one


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([(2.0, 40.0)] * 4, True),
        ([(2.0, 40.0)] * 3, False),
        ([(2.0, 40.0)] * 2 + [(2.21, 40.0)] * 2, False),
        ([(2.0, 40.0)] * 2 + [(1.79, 40.0)] * 2, False),  # still falling
        ([(2.0, 10.0)] * 2 + [(2.1, 36.0)] * 2, True),  # the last ones count
        ([(2.0, 40.0)] * 2 + [(2.0, 35.9)] * 2, False),
    ],
)
def test_ready_means_both(history, expected):
    assert ready(LengthsConfig(**LENGTHS), history, 40) is expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lengths": LENGTHS | {"limits": (40, 48)}}, "lengths.limits: the last one is not max_new_tokens=56"),
        ({"lengths": LENGTHS | {"limits": (56, 40, 56)}}, "are not two or more growing lengths"),
        ({"lengths": LENGTHS | {"length_share": 1.5}}, "length_share: 1.5 is not in (0, 1]"),
        ({"curriculum": EASY_FIRST | {"end": (0.5, 0.1)}}, "end: [0.5, 0.1] is no range of pass rates"),
        ({"sample_filter": {"pass_rate": (0.9, 0.1)}}, "sample_filter.pass_rate: [0.9, 0.1] is no range"),
        ({"epochs": 3, "updates": 4}, "epochs: 3 do not divide the 4 updates"),
    ],
)
def test_settings_that_cannot_be_are_told(more, message):
    given = {"samples": 4, "updates": 1, "max_new_tokens": 56, "slots": 4, "dynamic_sampling": False} | more
    _, problems = parse(RolloutConfig, rollouts(**given))
    assert any(message in problem for problem in problems)
