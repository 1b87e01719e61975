"""Credit by a value model equals Tulu 3's trainer, TRL's and verl's, and an independent sum over the future."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.objectives import PolicyGradient, algorithms
from lightning_jax.objectives.config import AdvantageConfig
from lightning_jax.objectives.policy_gradient import ADVANTAGES, OLD, RECORDED, REFERENCE, kl_estimate
from lightning_jax.objectives.value import RETURNS, VALUE_MASK, VALUES
from lightning_jax.optimizers import OptimizerConfig, ScheduleConfig
from lightning_jax.reinforcement.config import RewardConfig, ValueConfig
from lightning_jax.reinforcement.credit import with_credit, with_value_mask
from lightning_jax.reinforcement.grading import shaped
from lightning_jax.reinforcement.recipes import rewards

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "ppo.npz")
B, T = GOLDEN["values"].shape
BETA, PENALTY = 0.05, 4.0
UNFINISHED = {
    "verl": RewardConfig(**rewards(gsm8k=1.0)),
    "open_instruct": RewardConfig(**rewards(gsm8k=1.0, unfinished="replace", unfinished_score=-10.0)),
    "trl": RewardConfig(**rewards(gsm8k=1.0, unfinished="subtract", unfinished_score=PENALTY)),
}


def settings(oracle: str = "verl", **more) -> ValueConfig:
    fields = {
        "reward_model": "",
        "model": None,
        "discount": 0.99,
        "trace": 0.95,
        "reward_position": "eos" if oracle == "verl" else "after_eos",
        "whiten_rewards": oracle.endswith("_whitened"),
        "whiten_advantages": True,
        "clip": 0.2,
        "coefficient": 0.1,
        "warmup_steps": 0,
        "optimizer": OptimizerConfig(0.9, 0.999, 1e-8, 0.0, "all", 1.0, "float32"),
        "schedule": ScheduleConfig("constant", 1e-5, 1e-5, 0, 0, "linear", 0),
    }
    return ValueConfig(**(fields | more))


def golden_rows() -> dict[str, np.ndarray]:
    """A completion in each row, without a prompt: the first target is chosen at the first place."""
    mask = np.arange(T) < GOLDEN["length"][:, None]
    return {
        "inputs": np.where(mask, 5, 0),
        "targets": np.where(mask, 6, 0),
        "segment_ids": mask.astype(np.int32),
        "loss_mask": mask,
        OLD: np.where(mask, GOLDEN["old"], 0),
        RECORDED: np.where(mask, GOLDEN["old"], 0),
        REFERENCE: np.where(mask, GOLDEN["reference"], 0),
        VALUES: GOLDEN["values"],
    }


def credited(oracle: str) -> dict[str, np.ndarray]:
    config, rows = settings(oracle), golden_rows()
    unfinished = UNFINISHED[oracle.removesuffix("_whitened")]
    score = np.array(
        [
            shaped(score, unfinished, 1, finished=finished, max_new_tokens=T)
            for score, finished in zip(GOLDEN["score"], GOLDEN["finished"], strict=True)
        ]
    )
    penalty = BETA * np.where(rows["loss_mask"], GOLDEN["old"] - GOLDEN["reference"], 0)
    return with_credit(with_value_mask(rows, GOLDEN["finished"], config), score, penalty, config)


ORACLES = ["verl", "open_instruct", "open_instruct_whitened", "trl", "trl_whitened"]


@pytest.mark.parametrize("oracle", ORACLES)
def test_advantages_and_returns_equal_other_trainers(oracle):
    """Score behind the end or at it, unfinished completions replaced or lowered, rewards whitened or not."""
    rows = credited(oracle)
    np.testing.assert_allclose(rows[ADVANTAGES], GOLDEN[f"advantages/{oracle}"], rtol=1e-6, atol=1e-6)
    asked = rows[VALUE_MASK]
    np.testing.assert_allclose(rows[RETURNS][asked], GOLDEN[f"returns/{oracle}"][asked], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("oracle", ["open_instruct", "trl"])
def test_the_policys_loss_and_gradient_equal_other_trainers(oracle):
    with jax.enable_x64(True):
        rows = credited(oracle) | {ADVANTAGES: GOLDEN[f"advantages/{oracle}"]}
        batch = {name: jnp.asarray(array) for name, array in rows.items()}
        objective = PolicyGradient(None, algorithms.ppo(0.2), temperature=1.0)

        def loss(log_prob):
            total, metrics = objective.loss(objective.sums_of_log_probs(log_prob, log_prob, None, batch))
            return total, metrics["surrogate"]

        (_, surrogate), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(GOLDEN["log_prob"]))
    np.testing.assert_allclose(surrogate, GOLDEN[f"policy_loss/{oracle}"], rtol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"policy_gradient/{oracle}"], rtol=1e-6, atol=1e-9)


def test_advantages_are_sums_over_the_future_written_out():
    """A(t) = sum over l of (discount trace)^l (r(t+l) + discount V(t+l+1) - V(t+l)), each sum by itself."""
    config = settings(whiten_advantages=False, discount=0.9, trace=0.8)
    rows = with_value_mask(golden_rows(), GOLDEN["finished"], config)
    rows = with_credit(rows, GOLDEN["score"], np.full((B, T), 0.01), config)
    for row in range(B):
        length, values = GOLDEN["length"][row], GOLDEN["values"][row]
        rewards = np.full(length, -0.01)
        rewards[-1] += GOLDEN["score"][row]
        for t in range(length):
            following = [values[later + 1] if later + 1 < length else 0.0 for later in range(t, length)]
            errors = rewards[t:] + 0.9 * np.array(following) - values[t:length]
            expected = sum((0.9 * 0.8) ** ahead * error for ahead, error in enumerate(errors))
            np.testing.assert_allclose(rows[ADVANTAGES][row, t], expected, rtol=1e-5, atol=1e-6)


def test_behind_the_end_the_end_token_is_read_and_only_its_value_asked():
    rows = with_value_mask(golden_rows(), GOLDEN["finished"], settings("trl"))
    before = golden_rows()
    length = int(GOLDEN["length"][0])
    assert rows["inputs"][0, length] == before["targets"][0, length - 1]
    assert rows["segment_ids"][0, length] == 1
    assert rows[VALUE_MASK][0].sum() == length + 1
    np.testing.assert_array_equal(rows["loss_mask"], before["loss_mask"])  # the policy never trains there
    cut, full = 5, 1  # neither has a place behind it: one was cut, the other fills its row
    for row in (cut, full):
        np.testing.assert_array_equal(rows[VALUE_MASK][row], before["loss_mask"][row])
    unmoved = with_value_mask(golden_rows(), GOLDEN["finished"], settings("verl"))
    np.testing.assert_array_equal(unmoved["inputs"], before["inputs"])


def test_a_cut_completion_has_its_score_at_its_last_token_though_its_row_goes_on():
    rows = with_value_mask(golden_rows(), np.zeros(B, bool), settings("trl"))
    np.testing.assert_array_equal(rows[VALUE_MASK], rows["loss_mask"])


def test_with_the_score_at_the_end_or_behind_it_a_perfect_value_gives_no_advantage():
    """Whatever is expected comes: no token made a difference, in either convention."""
    for oracle in ("verl", "trl"):
        config = settings(oracle, whiten_advantages=False, discount=1.0)
        rows = with_value_mask(golden_rows(), GOLDEN["finished"], config)
        rows[VALUES] = np.where(rows[VALUE_MASK], GOLDEN["score"][:, None], 0)
        rows = with_credit(rows, GOLDEN["score"], 0.0, config)
        np.testing.assert_allclose(rows[ADVANTAGES], 0, atol=1e-6)


def test_a_completion_without_score_counts_nowhere():
    config = settings("trl")
    score = np.where(np.arange(B) == 2, np.nan, GOLDEN["score"])
    rows = with_credit(with_value_mask(golden_rows(), GOLDEN["finished"], config), score, 0.0, config)
    assert not rows["loss_mask"][2].any()
    assert not rows[VALUE_MASK][2].any()
    assert not rows[ADVANTAGES][2].any()
    others = np.arange(B) != 2
    alone = {name: array[others] for name, array in golden_rows().items()}
    alone = with_credit(with_value_mask(alone, GOLDEN["finished"][others], config), score[others], 0.0, config)
    np.testing.assert_array_equal(rows[ADVANTAGES][others], alone[ADVANTAGES])  # and has no say in whitening


def test_whitening_is_over_tokens_of_the_policy_alone():
    rows = credited("trl")
    inside = rows[ADVANTAGES][rows["loss_mask"]]
    np.testing.assert_allclose([inside.mean(), inside.std(ddof=1)], [0, 1], atol=1e-5)
    assert not rows[ADVANTAGES][~rows["loss_mask"]].any()


def test_the_divergence_in_the_goldens_is_our_k1():
    np.testing.assert_allclose(
        kl_estimate("k1", GOLDEN["old"], GOLDEN["reference"]), GOLDEN["old"] - GOLDEN["reference"]
    )


def test_settings_that_cannot_be_are_told():
    for more, message in (
        ({"discount": 1.5}, "discount: 1.5 is not in [0, 1]"),
        ({"trace": -0.1}, "trace: -0.1 is not in [0, 1]"),
        ({"clip": -0.2}, "clip: -0.2 is negative"),
        ({"coefficient": 0.0}, "coefficient: 0.0 is not positive"),
        ({"warmup_steps": -1}, "warmup_steps: -1 is negative"),
    ):
        assert any(message in problem for problem in settings(**more).problems())
    (problem,) = AdvantageConfig("value", "group", 1, 1e-6, 1e-3).problems()
    assert "value.whiten_advantages" in problem
