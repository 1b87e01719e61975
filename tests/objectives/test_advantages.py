"""Advantages equal those of other trainers, and every way of dividing by nearly nothing is closed."""

import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_jax.objectives import AdvantageConfig
from lightning_jax.objectives.advantages import (
    generalized_advantages,
    group_advantages,
    informative_groups,
    whitened,
)

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "policy_gradient.npz")
GRPO = AdvantageConfig(baseline="group", std="group", std_ddof=1, std_epsilon=1e-6, std_floor=1e-3)
DR_GRPO = AdvantageConfig(baseline="group", std="none", std_ddof=0, std_epsilon=0.0, std_floor=1e-3)
RLOO = AdvantageConfig(baseline="leave_one_out", std="none", std_ddof=0, std_epsilon=0.0, std_floor=1e-3)


@pytest.mark.parametrize(("name", "config"), [("grpo", GRPO), ("dr_grpo", DR_GRPO), ("leave_one_out", RLOO)])
def test_advantages_of_groups_equal_verls(name, config):
    np.testing.assert_allclose(
        group_advantages(GOLDEN["scores"], config), GOLDEN[f"advantages/verl/{name}"], rtol=1e-6, atol=1e-7
    )


def test_the_two_conventions_of_the_deviation_differ_as_published():
    scores = np.array([[1.0, 0.0, 1.0, 1.0]])
    trl = AdvantageConfig(baseline="group", std="group", std_ddof=1, std_epsilon=1e-4, std_floor=0.0)
    population = AdvantageConfig(baseline="group", std="group", std_ddof=0, std_epsilon=1e-8, std_floor=0.0)
    np.testing.assert_allclose(group_advantages(scores, trl)[0, :2], [0.4999, -1.4997], atol=1e-4)
    np.testing.assert_allclose(group_advantages(scores, population)[0, :2], [0.577, -1.732], atol=1e-3)


@pytest.mark.parametrize("config", [GRPO, DR_GRPO, RLOO])
def test_a_single_completion_teaches_nothing(config):
    np.testing.assert_array_equal(group_advantages(np.array([[3.0]]), config), [[0.0]])


@pytest.mark.parametrize("config", [GRPO, RLOO])
def test_rounding_of_equal_rewards_is_no_signal(config):
    residue = np.array([[0.1, 0.1 + 1e-8, 0.1, 0.1 - 1e-8]])
    np.testing.assert_array_equal(group_advantages(residue, config), np.zeros((1, 4)))
    np.testing.assert_array_equal(informative_groups(residue, config), [False])


def test_a_completion_without_reward_has_no_advantage_and_no_say():
    scores = np.array([[1.0, 0.0, np.nan, 1.0]])
    advantages = group_advantages(scores, GRPO)
    assert advantages[0, 2] == 0
    np.testing.assert_allclose(advantages[0, [0, 1, 3]], group_advantages(scores[:, [0, 1, 3]], GRPO)[0])
    nothing = group_advantages(np.full((1, 3), np.nan), GRPO)
    np.testing.assert_array_equal(nothing, np.zeros((1, 3)))


def test_division_by_the_batchs_deviation_keeps_the_groups_in_proportion():
    scores = np.array([[1.0, 0.0], [10.0, 0.0]])
    batch = AdvantageConfig(baseline="group", std="batch", std_ddof=0, std_epsilon=0.0, std_floor=0.0)
    advantages = group_advantages(scores, batch)
    np.testing.assert_allclose(advantages, [[0.5, -0.5], [5, -5]] / scores.std())


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(-3, 3))
def test_a_constant_added_to_the_rewards_changes_nothing(scores, shift):
    scores = np.round(np.array([scores]), 3)
    np.testing.assert_allclose(group_advantages(scores + shift, RLOO), group_advantages(scores, RLOO), atol=1e-9)


def test_generalized_advantages_equal_open_instructs_and_a_second_implementation_of_verl():
    mask = np.ones(GOLDEN["mask"].shape, bool)
    everywhere = generalized_advantages(GOLDEN["token_rewards"], GOLDEN["values"], mask, discount=0.99, trace=0.95)
    for ours, name in zip(everywhere, ("gae", "returns"), strict=True):
        np.testing.assert_allclose(ours, GOLDEN[f"{name}/open_instruct"], rtol=1e-9)
    mask = GOLDEN["mask"]
    advantages, returns = generalized_advantages(
        GOLDEN["token_rewards"], GOLDEN["values"], mask, discount=0.99, trace=0.95
    )
    np.testing.assert_allclose(returns[mask], GOLDEN["returns/verl"][mask], rtol=1e-6)
    np.testing.assert_allclose(whitened(advantages, mask)[mask], GOLDEN["gae/verl"][mask], rtol=1e-5)


def test_with_a_trace_of_one_and_no_discount_the_return_is_what_is_still_to_come():
    rewards, values = np.array([[0.0, 0.0, 1.0, 9.0]]), np.array([[0.3, 0.1, 0.7, 9.0]])
    mask = np.array([[True, True, True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, discount=1.0, trace=1.0)
    np.testing.assert_allclose(returns, [[1, 1, 1, 0]])
    np.testing.assert_allclose(advantages, [[0.7, 0.9, 0.3, 0]])


def test_tokens_of_a_tool_are_passed_over():
    rewards, values = np.array([[0.0, 5.0, 1.0]]), np.array([[0.3, 7.0, 0.7]])
    tool = generalized_advantages(rewards, values, np.array([[True, False, True]]), discount=0.9, trace=0.8)
    without = generalized_advantages(
        rewards[:, [0, 2]], values[:, [0, 2]], np.ones((1, 2), bool), discount=0.9, trace=0.8
    )
    for one, other in zip(tool, without, strict=True):
        np.testing.assert_allclose(one[:, [0, 2]], other)
        assert one[0, 1] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std_ddof": 2}, "std_ddof: 2 is neither 0 nor 1"),
        ({"std_floor": -1.0}, "std_floor: -1.0 is negative"),
        ({"std": "none"}, 'std: "none" divides by nothing'),
    ],
)
def test_settings_that_cannot_be_are_told(change, message):
    settings = {"baseline": "group", "std": "group", "std_ddof": 1, "std_epsilon": 1e-6, "std_floor": 1e-3}
    (problem,) = AdvantageConfig(**(settings | change)).problems()
    assert message in problem
