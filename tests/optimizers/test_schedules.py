"""Schedules at their corners, against closed forms in Python floats."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.optimizers import ScheduleConfig, learning_rate

WSD = {
    "kind": "wsd",
    "peak": 4e-4,
    "final": 4e-5,
    "warmup_steps": 10,
    "decay_steps": 40,
    "decay_shape": "linear",
    "first_step": 0,
}

# Share of the way from peak to final that is left halfway through the decay.
HALFWAY = {"linear": 0.5, "cosine": 0.5, "sqrt": 1 - math.sqrt(0.5)}


def at(schedule: ScheduleConfig, total_steps: int, *steps: int) -> list[float]:
    rate = learning_rate(schedule, total_steps)
    return [float(rate(step)) for step in steps]


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_wsd_at_its_corners(shape):
    rates = at(ScheduleConfig(**WSD | {"decay_shape": shape}), 100, 0, 5, 10, 60, 80, 100, 1000)
    halfway = 4e-5 + HALFWAY[shape] * 3.6e-4
    np.testing.assert_allclose(rates, [0, 2e-4, 4e-4, 4e-4, halfway, 4e-5, 4e-5], rtol=2e-6)


def test_constant_then_exponential_passes_the_geometric_mean_halfway():
    schedule = ScheduleConfig("wsd", 1.3e-4, 3e-5, 0, 40, "exponential", 0)
    rates = at(schedule, 100, 0, 59, 60, 80, 90, 100, 1000)
    expected = [1.3e-4, 1.3e-4, 1.3e-4, math.sqrt(1.3e-4 * 3e-5), 1.3e-4 * (3 / 13) ** 0.75, 3e-5, 3e-5]
    np.testing.assert_allclose(rates, expected, rtol=2e-6)


def test_constant_then_decay_of_minimax_m1():
    schedule = ScheduleConfig("wsd", 8e-5, 8e-6, 0, 50, "linear", 0)
    np.testing.assert_allclose(at(schedule, 75, 0, 25, 50, 75), [8e-5, 8e-5, 4.4e-5, 8e-6], rtol=2e-6)


def test_cosine_ends_where_it_says_and_stays():
    schedule = ScheduleConfig("cosine", 4e-4, 4e-5, 10, 110, "linear", 0)
    rates = at(schedule, 200, 0, 10, 35, 60, 110, 150, 500)
    quarter = 4e-5 + 3.6e-4 * (1 + math.cos(math.pi / 4)) / 2
    np.testing.assert_allclose(rates, [0, 4e-4, quarter, 2.2e-4, 4e-5, 4e-5, 4e-5], rtol=2e-6)


def test_constant_warms_up_and_never_falls():
    schedule = ScheduleConfig("constant", 3e-4, 3e-4, 4, 0, "linear", 0)
    np.testing.assert_allclose(at(schedule, 10, 0, 1, 4, 9, 99), [0, 7.5e-5, 3e-4, 3e-4, 3e-4], rtol=2e-6)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_a_schedule_that_spans_two_stages_equals_itself_in_one(kind):
    whole = ScheduleConfig(**WSD | {"kind": kind})
    later = ScheduleConfig(**WSD | {"kind": kind, "first_step": 70})
    np.testing.assert_array_equal(at(whole, 100, 70, 85, 99), at(later, 30, 0, 15, 29))


@pytest.mark.parametrize("schedule", [ScheduleConfig(**WSD), ScheduleConfig("constant", 3e-4, 3e-4, 0, 0, "linear", 0)])
def test_an_array_of_steps_a_traced_step_and_an_integer_give_the_same(schedule):
    rate = learning_rate(schedule, 100)
    steps = np.arange(0, 120, 7)
    one_by_one = np.array([float(rate(int(step))) for step in steps], np.float32)
    np.testing.assert_allclose(rate(steps), one_by_one, rtol=1e-6)
    np.testing.assert_allclose([jax.jit(rate)(jnp.int32(step)) for step in steps], one_by_one, rtol=1e-6)


def test_warmup_and_decay_that_do_not_fit_are_one_clear_line():
    with pytest.raises(ValueError, match=r"schedule.decay_steps: 40 after warmup_steps=10 do not fit into 49 steps"):
        learning_rate(ScheduleConfig(**WSD), 49)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"peak": 0.0}, "peak"),
        ({"final": 5e-4}, "final"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"decay_shape": "exponential", "final": 0.0}, "final"),
        ({"kind": "cosine", "decay_steps": 10}, "decay_steps"),
        ({"kind": "constant"}, "kind"),
    ],
)
def test_problems_name_the_field(changes, field):
    problems = ScheduleConfig(**WSD | changes).problems()
    assert [problem.split(":")[0] for problem in problems][:1] == [field]
    assert ScheduleConfig(**WSD).problems() == []
