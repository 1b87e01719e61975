"""Weighted sums of rewards and rewards by data set."""

import pytest
from audit import completion

from lightning_jax.errors import UserError
from lightning_jax.rewards import ByDataset, Reward, WeightedSum


def length(completions):
    return [Reward(float(len(each.text)), "letters") for each in completions]


class Failing:
    """Fails the first `times` that it sees each text with an x."""

    def __init__(self, times: int):
        self.times, self.batches = times, []

    def __call__(self, completions):
        self.batches.append([each.text for each in completions])
        return [
            Reward.infra("away") if "x" in each.text and len(self.batches) <= self.times else Reward(1.0, "there")
            for each in completions
        ]


def test_scores_are_weighted_and_summed_and_the_parts_kept():
    total = WeightedSum({"length": (0.5, length), "one": (2.0, Failing(0))})
    (reward,) = total([completion("abcd")])
    assert reward.score == 0.5 * 4 + 2.0
    assert reward.reason == "length 4: letters; one 1: there"
    assert reward.parts["length"].score == 4


def test_only_what_failed_is_tried_again():
    failing = Failing(2)
    rewards = WeightedSum({"one": (1.0, failing)}, attempts=3, pause=0)([completion("a"), completion("x")])
    assert failing.batches == [["a", "x"], ["x"], ["x"]]
    assert [reward.score for reward in rewards] == [1.0, 1.0]


def test_what_keeps_failing_has_no_score_and_is_no_zero():
    failing = Failing(9)
    good, bad = WeightedSum({"length": (1.0, length), "one": (1.0, failing)}, attempts=2, pause=0)(
        [completion("a"), completion("x")]
    )
    assert good.score == 2
    assert (bad.score, bad.infra_error, bad.reason) == (None, True, "one: away")
    assert len(failing.batches) == 2


def test_a_weight_of_zero_only_watches():
    (reward,) = WeightedSum({"length": (1.0, length), "one": (0.0, Failing(9))}, attempts=1)([completion("x")])
    assert reward.score == 1
    assert reward.parts["one"].infra_error


def test_each_record_goes_to_the_reward_of_its_data_set():
    rewards = ByDataset({"long": length, "one": Failing(0)})(
        [completion("ab", dataset="one"), completion("abc", dataset="long"), completion("", dataset="one")]
    )
    assert [reward.score for reward in rewards] == [1, 3, 1]


def test_a_data_set_without_a_reward_is_said_in_one_line():
    with pytest.raises(UserError, match=r"record 0: dataset='other' has no reward; there are rewards for long"):
        ByDataset({"long": length})([completion("a", dataset="other")])


@pytest.mark.parametrize(("score", "infra_error"), [(None, False), (0.0, True), (float("nan"), False)])
def test_a_reward_has_a_finite_score_or_an_infra_error(score, infra_error):
    with pytest.raises(ValueError, match="a reward"):
        Reward(score, "", infra_error=infra_error)
