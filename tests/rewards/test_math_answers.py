"""Rewards of math: audited, and not to be stopped by what a model writes."""

import signal

import pytest
from audit import assert_audited, completion

from lightning_jax.errors import UserError
from lightning_jax.json_process import ProcessEnded
from lightning_jax.rewards import MathReward, gsm8k_reward


@pytest.fixture(scope="module")
def math_reward():
    pytest.importorskip("math_verify", reason="needs math-verify: pip install 'lightning_jax[rewards]'")
    with MathReward(processes=1, cpu_seconds=1) as reward:
        yield reward


def test_gsm8k_reward_is_audited():
    assert_audited(
        gsm8k_reward,
        {"ground_truth": "1,018"},
        gold=["A: 1018", "#### 1,018", "It is 1018.00.", "<think>3</think>1018"],
        wrong=["1018 or 1019", "A: -1018", "1018<think></think>", "101 8"],
    )


def test_gsm8k_ground_truths_are_numbers():
    with pytest.raises(UserError, match="ground_truth='abc' is not a number"):
        gsm8k_reward([completion("1", ground_truth="abc")])


def test_a_record_without_ground_truth_is_said_in_one_line():
    with pytest.raises(UserError, match="a record without ground_truth, which its reward reads; it has answer"):
        gsm8k_reward([completion("1", answer="1")])


@pytest.mark.parametrize(
    ("truth", "gold", "wrong"),
    [
        (r"\frac{3}{56}", [r"\boxed{\frac{3}{56}}", r"\boxed{\dfrac{6}{112}}", r"$3/56$"], [r"\boxed{\frac{3}{57}}"]),
        ("2\\sqrt{2}", [r"\boxed{\sqrt8}", r"The final answer is $2 \sqrt{2}$."], [r"\boxed{2.83}"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"\boxed{(3,\frac{\pi}{2})}"], [r"\boxed{(\frac{\pi}{2}, 3)}"]),
        (r"\text{Evelyn}", [r"\boxed{Evelyn}", r"\boxed{\text{Evelyn}}"], [r"\boxed{\text{Briana}}"]),
        ("x^2+2x+1", [r"\boxed{(x+1)^2}"], [r"\boxed{(x-1)^2}"]),
        ("18", [r"\boxed{18}", "A: 18"], [r"\boxed{18} no, \boxed{19}", r"\boxed{19}. The final answer is 18."]),
    ],
)
def test_math_reward_is_audited(math_reward, truth, gold, wrong):
    assert_audited(math_reward, {"ground_truth": truth}, gold, wrong)


def test_an_answer_that_cannot_be_computed_is_wrong_and_stops_nobody(math_reward):
    texts = [r"\boxed{\frac{10^{10^{10}}!}{3}}", r"\boxed{4}"]
    rewards = math_reward([completion(text, ground_truth="4.0") for text in texts])
    assert [reward.score for reward in rewards] == [0, 1]


def test_an_answer_beyond_all_length_is_wrong(math_reward):
    (reward,) = math_reward([completion(r"\boxed{" + "1+" * 10_000 + "1}", ground_truth="10001")])
    assert reward.score == 0


def test_a_process_that_crashes_is_an_infra_error_and_is_replaced(math_reward, monkeypatch):
    def crash(self, request, seconds):
        raise ProcessEnded("exit code -9", -signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("lightning_jax.json_process.JSONProcess.ask", crash)
        (reward,) = math_reward([completion("1", ground_truth="2")])
    assert (reward.infra_error, reward.reason) == (True, "math-verify: exit code -9")
    assert math_reward([completion("2.0", ground_truth="2")])[0].score == 1


def test_an_answer_that_crashes_the_parser_is_wrong(math_reward, monkeypatch):
    def crash(self, request, seconds):
        raise ProcessEnded("exit code -11", -signal.SIGSEGV)

    monkeypatch.setattr("lightning_jax.json_process.JSONProcess.ask", crash)
    (reward,) = math_reward([completion("1", ground_truth="2")])
    assert (reward.score, reward.reason) == (0, "SIGSEGV")


def test_what_is_missing_is_said_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lightning_jax\[rewards\]'"):
        MathReward()
