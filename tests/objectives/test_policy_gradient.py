"""The policy-gradient objective equals other trainers', and each of their known mistakes would be seen here."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from tiny_model import tiny_model

from lightning_jax.generation import token_log_probs
from lightning_jax.models import HybridLM
from lightning_jax.objectives import PolicyGradient, algorithms
from lightning_jax.objectives.policy_gradient import (
    ADVANTAGES,
    OLD,
    RECORDED,
    REFERENCE,
    kl_loss,
    sequence_log_probs,
    token_terms,
)
from lightning_jax.train_step import accumulated_sums

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "policy_gradient.npz")
B, T = GOLDEN["mask"].shape
EXACT = {"param_dtype": "float64", "compute_dtype": "float64", "logits_dtype": "float64"}
MODEL = tiny_model(**EXACT, num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=4, num_experts=0, experts_per_token=0)
PPO = algorithms.ppo()
CORRECTED = {"rollout_correction_min": 0.8, "rollout_correction_max": 1.25}
SETTINGS = {
    "ppo": PPO,
    "grpo": algorithms.grpo(kl_coefficient=0.0),
    "grpo_kl": algorithms.grpo(kl_coefficient=0.04),
    "dr_grpo": algorithms.dr_grpo(12),
    "dapo": algorithms.dapo(),
    "dual_clip": algorithms.ppo(dual_clip=1.5),
    "gspo": algorithms.gspo(0.1, 0.1),
    "cispo": algorithms.cispo(1.2),
    "cispo_both_sides": dataclasses.replace(algorithms.cispo(1.2), is_weight_min=0.8),
    "truncated": dataclasses.replace(
        PPO, rollout_correction="truncate", rollout_correction_min=0.0, rollout_correction_max=1.1
    ),
    "icepop": dataclasses.replace(PPO, rollout_correction="mask", **CORRECTED),
}
ORACLES = [name.removeprefix("loss/") for name in GOLDEN.files if name.startswith("loss/")]


def golden_batch() -> dict[str, jax.Array]:
    """The completions of the goldens, a row for each."""
    mask = GOLDEN["mask"]
    batch = {OLD: GOLDEN["old"], RECORDED: GOLDEN["recorded"], REFERENCE: GOLDEN["reference"]}
    batch = {name: jnp.asarray(np.where(mask, values, 0)) for name, values in batch.items()}
    batch[ADVANTAGES] = jnp.asarray(np.where(mask, GOLDEN["advantage"][:, None], 0))
    batch["loss_mask"], batch["segment_ids"] = jnp.asarray(mask), jnp.asarray(mask.astype(np.int32))
    return batch


def loss_and_metrics(settings, log_prob, batch):
    objective = PolicyGradient(MODEL, settings, temperature=1.0)
    return objective.loss(objective.sums_of_log_probs(log_prob, jnp.zeros_like(log_prob), None, batch))


def gradient(settings, log_prob, batch):
    return jax.grad(lambda x: loss_and_metrics(settings, x, batch)[0])(log_prob)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("oracle", [name for name in ORACLES if name.partition("/")[2] in SETTINGS])
def test_value_and_gradient_equal_other_trainers(oracle):
    settings = SETTINGS[oracle.partition("/")[2]]
    log_prob, batch = jnp.asarray(GOLDEN["log_prob"]), golden_batch()
    loss, metrics = loss_and_metrics(settings, log_prob, batch)
    # What clips a weight has its own value, what masks tokens is PPO's and the others' surrogate.
    value = loss if settings.is_weight_max else metrics["surrogate"] + settings.kl_coefficient * metrics["kl"]
    np.testing.assert_allclose(value, GOLDEN[f"loss/{oracle}"], rtol=1e-6)
    expected = GOLDEN[f"gradient/{oracle}"] * GOLDEN["mask"]
    np.testing.assert_allclose(gradient(settings, log_prob, batch), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("source", ["verl", "open_instruct"])
def test_estimators_of_the_divergence_equal_other_trainers(source, estimator):
    mask = GOLDEN["mask"]

    def mean(log_prob):
        return jnp.mean(kl_loss(estimator, log_prob, GOLDEN["reference"])[mask])

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(GOLDEN["log_prob"]))
    np.testing.assert_allclose(value, GOLDEN[f"loss/{source}/{estimator}"], rtol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"gradient/{source}/{estimator}"], rtol=1e-6, atol=1e-9)


def test_only_k2_has_the_gradient_of_the_divergence():
    """By summing over all tokens of a distribution instead of sampling."""
    logits, reference = jnp.array([0.3, -1.0, 2.0, 0.1]), jax.nn.log_softmax(jnp.array([1.0, 0.2, -0.5, 0.4]))

    def divergence(logits):
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - reference))

    def expected_gradient(estimator):
        p = jax.nn.softmax(logits)
        return jax.grad(lambda x: jnp.sum(p * kl_loss(estimator, jax.nn.log_softmax(x), reference)))(logits)

    exact = jax.grad(divergence)(logits)
    np.testing.assert_allclose(expected_gradient("k2"), exact, rtol=1e-12)
    np.testing.assert_allclose(expected_gradient("k1"), jnp.zeros(4), atol=1e-15)
    assert jnp.max(jnp.abs(expected_gradient("k3") - exact)) > 0.05


def test_the_unified_form_without_a_cap_has_the_gradient_of_ppos_clip():
    """Equations 6 and 7 of MiniMax-M1 against equation 7 of PPO, written out."""
    log_prob, batch = jnp.asarray(GOLDEN["log_prob"]), golden_batch()

    def clipped(log_prob):
        ratio, advantages = jnp.exp(log_prob - batch[OLD]), batch[ADVANTAGES]
        terms = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.28) * advantages)
        return -jnp.sum(jnp.where(batch["loss_mask"], terms, 0)) / jnp.sum(batch["loss_mask"])

    expected = jax.grad(clipped)(log_prob)
    masked = dataclasses.replace(algorithms.masked_cispo(low=0.2, high=0.28), is_weight_max=None)
    assert jnp.max(jnp.abs(gradient(masked, log_prob, batch) - expected)) < 1e-8
    assert jnp.any(expected[GOLDEN["mask"]] == 0)  # some are clipped
    assert jnp.max(jnp.abs(gradient(algorithms.cispo(), log_prob, batch) - expected)) > 1e-3


def test_the_unified_form_without_a_mask_is_cispo():
    log_prob, batch = jnp.asarray(GOLDEN["log_prob"]), golden_batch()
    unmasked = dataclasses.replace(algorithms.masked_cispo(1.2), mask_low=None, mask_high=None)
    assert unmasked == algorithms.cispo(1.2)
    capped = gradient(algorithms.masked_cispo(1.2), log_prob, batch)
    assert jnp.any(capped != gradient(unmasked, log_prob, batch))


def test_on_policy_every_algorithm_is_reinforce():
    batch = golden_batch()
    token_mean = [algorithms.ppo(), algorithms.dapo(), algorithms.cispo(), algorithms.masked_cispo()]
    expected = gradient(algorithms.REINFORCE, batch[OLD], batch)
    for settings in token_mean:
        np.testing.assert_allclose(gradient(settings, batch[OLD], batch), expected, rtol=1e-12)
    by_hand = -np.where(GOLDEN["mask"], GOLDEN["advantage"][:, None], 0) / GOLDEN["mask"].sum()
    np.testing.assert_allclose(expected, by_hand, rtol=1e-12)


def test_a_good_rare_token_is_pushed_up():
    """Without the stop-gradient of CISPO's weight it would be pushed down: d(r log p) = r (1 + log p) < 0."""
    log_prob = jnp.array([[-3.0, -0.5, -1.0, -6.0]])
    batch = {OLD: log_prob, RECORDED: log_prob, ADVANTAGES: jnp.ones((1, 4))}
    batch |= {"loss_mask": jnp.ones((1, 4), bool), "segment_ids": jnp.ones((1, 4), jnp.int32)}
    np.testing.assert_allclose(gradient(algorithms.cispo(), log_prob, batch), jnp.full((1, 4), -1 / 4))


def test_the_cap_is_absolute_and_a_cap_read_as_a_distance_from_one_is_refused():
    log_prob, batch = jnp.asarray(GOLDEN["log_prob"]), golden_batch()
    terms = token_terms(algorithms.cispo(1.2), log_prob, batch)
    ratio = np.exp(GOLDEN["log_prob"] - GOLDEN["old"])[GOLDEN["mask"]]
    np.testing.assert_array_equal(terms.capped[GOLDEN["mask"]], ratio > 1.2)  # of either sign of the advantage
    (problem,) = algorithms.cispo(0.2).problems()
    assert "is_weight_max: 0.2 is an absolute cap" in problem
    assert "is_weight_max=1.2" in problem


@pytest.mark.parametrize(
    "settings",
    [
        algorithms.REINFORCE,
        dataclasses.replace(algorithms.REINFORCE, kl_coefficient=0.1, kl_estimator="k3"),
        dataclasses.replace(algorithms.REINFORCE, kl_coefficient=0.1, kl_estimator="k2", reduction="sequence_mean"),
    ],
)
def test_gradients_are_finite_differences(settings):
    batch = golden_batch()
    check_grads(
        lambda x: loss_and_metrics(settings, x, batch)[0],
        (jnp.asarray(GOLDEN["log_prob"]),),
        1,
        modes=["rev"],
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo", "dual_clip", "dr_grpo"])
def test_gradients_are_finite_differences_of_the_loss_with_frozen_weights(name):
    """The weight is a number: the loss is linear in the log-probabilities, with the weights taken where they are."""
    log_prob, batch = jnp.asarray(GOLDEN["log_prob"]), golden_batch()
    terms = token_terms(SETTINGS[name], log_prob, batch)
    mask, advantages = GOLDEN["mask"], np.asarray(batch[ADVANTAGES])
    weight = np.where(mask, -np.asarray(terms.loss) / np.where(mask, advantages * GOLDEN["log_prob"], 1), 0)
    length = mask.sum(1, keepdims=True)
    share = {"token_mean": 1 / mask.sum(), "sequence_mean": 1 / (B * length), "constant": 1 / (B * 12)}
    expected = -weight * advantages * share[SETTINGS[name].reduction]
    np.testing.assert_allclose(gradient(SETTINGS[name], log_prob, batch), expected, rtol=1e-9, atol=1e-12)


def test_a_flipped_advantage_flips_the_gradient_of_cispo_and_not_that_of_ppo():
    log_prob, batch = jnp.asarray(GOLDEN["log_prob"]), golden_batch()
    flipped = batch | {ADVANTAGES: -batch[ADVANTAGES]}
    np.testing.assert_allclose(
        gradient(algorithms.cispo(), log_prob, flipped), -gradient(algorithms.cispo(), log_prob, batch)
    )
    difference = gradient(PPO, log_prob, flipped) + gradient(PPO, log_prob, batch)
    assert jnp.max(jnp.abs(difference)) > 1e-3  # another side of the clip


def test_the_correction_for_another_program_is_clamped():
    batch = golden_batch()
    far = batch | {RECORDED: jnp.where(batch["loss_mask"], batch[OLD] - 50, 0)}
    loss, metrics = loss_and_metrics(SETTINGS["truncated"], jnp.asarray(GOLDEN["log_prob"]), far)
    assert jnp.isfinite(loss)
    np.testing.assert_allclose(metrics["rollout_correction"], 1.1)
    _, metrics = loss_and_metrics(SETTINGS["icepop"], jnp.asarray(GOLDEN["log_prob"]), far)
    assert metrics["rollout_correction"] == 0


def test_one_ratio_of_a_completion_is_of_its_mean_and_not_of_its_sum():
    """However long it is, completions with the same change of every token have the same ratio."""
    batch = golden_batch()
    terms = token_terms(algorithms.gspo(), batch[OLD] + 0.1, batch)
    weight = -terms.loss / (batch[ADVANTAGES] * (batch[OLD] + 0.1))
    kept = GOLDEN["mask"] & ~np.asarray(terms.masked)
    assert kept.any()
    np.testing.assert_allclose(weight[kept], np.exp(0.1), rtol=1e-9)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "gspo"])
def test_only_the_tokens_of_the_optimizer_step_count(name):
    """Neither padding nor completions without signal, nor how the rows are divided, have a say."""
    log_prob, batch = jnp.asarray(GOLDEN["log_prob"]), golden_batch()
    settings = SETTINGS[name]
    objective = PolicyGradient(MODEL, settings, temperature=1.0)

    def of_parts(x, count):
        def sums(part):
            return objective.sums_of_log_probs(part.pop("log_prob"), part.pop("entropy"), None, part)

        rows = batch | {"log_prob": x, "entropy": jnp.zeros_like(x)}
        return objective.loss(accumulated_sums(lambda part: sums(dict(part)), rows, count))[0]

    whole = loss_and_metrics(settings, log_prob, batch)[0]
    for count in (2, 3, 6):
        np.testing.assert_allclose(of_parts(log_prob, count), whole, rtol=1e-9)
    padded = {name: jnp.pad(values, ((0, 4), (0, 3))) for name, values in batch.items()}
    more = loss_and_metrics(settings, jnp.pad(log_prob, ((0, 4), (0, 3)), constant_values=-7.0), padded)[0]
    np.testing.assert_allclose(more, whole, rtol=1e-12)


def test_sixteen_updates_are_each_divided_by_their_own_tokens():
    """The loss of a step does not know into how many steps its generation was divided."""
    log_prob, batch = jnp.asarray(GOLDEN["log_prob"]), golden_batch()
    one = {name: values[:1] for name, values in batch.items()}
    loss = loss_and_metrics(algorithms.cispo(), log_prob[:1], one)[0]
    terms = token_terms(algorithms.cispo(), log_prob[:1], one).loss
    np.testing.assert_allclose(loss, jnp.sum(jnp.where(one["loss_mask"], terms, 0)) / GOLDEN["mask"][0].sum())


@functools.cache
def tiny() -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(HybridLM(dataclasses.replace(MODEL, initializer_range=0.4), rngs=nnx.Rngs(0)), nnx.Param)


def packed_rows():
    """Two completions in one row, and the same in a row each."""
    rng = np.random.default_rng(0)
    lengths = (7, 5)
    tokens = [rng.integers(0, MODEL.vocab_size, length + 1) for length in lengths]
    apart, together = {}, {}
    columns = {
        "inputs": [each[:-1] for each in tokens],
        "targets": [each[1:] for each in tokens],
        "segment_ids": [np.full(length, 1 + row) for row, length in enumerate(lengths)],
        "positions": [np.arange(length) for length in lengths],
        "loss_mask": [np.arange(length) >= 2 for length in lengths],
        ADVANTAGES: [np.full(length, advantage) for length, advantage in zip(lengths, (1.0, -0.7), strict=True)],
        OLD: [rng.normal(-3, 0.2, length) for length in lengths],
    }
    columns[RECORDED] = columns[OLD]
    for name, (first, second) in columns.items():
        together[name] = jnp.asarray(np.concatenate([first, second])[None])
        ones = second if name != "segment_ids" else np.ones_like(second)
        apart[name] = jnp.asarray(np.stack([first, np.pad(ones, (0, 2))]))
    return together, apart


@pytest.mark.parametrize("name", ["cispo", "gspo", "dr_grpo"])
def test_packing_changes_neither_loss_nor_gradient(name):
    graphdef, params = tiny()
    objective = PolicyGradient(MODEL, SETTINGS[name], temperature=0.7)

    def loss(params, batch):
        return objective.loss(objective.sums(nnx.merge(graphdef, params), batch))[0]

    together, apart = (jax.jit(jax.value_and_grad(loss))(params, batch) for batch in packed_rows())
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_log_probs_are_those_of_the_sampling_temperature():
    graphdef, params = tiny()
    model, (batch, _) = nnx.merge(graphdef, params), packed_rows()
    log_prob, entropy, _ = sequence_log_probs(model, MODEL, batch, temperature=0.7)
    np.testing.assert_allclose(log_prob, token_log_probs(model, batch, temperature=0.7), rtol=1e-12)
    assert jnp.max(jnp.abs(log_prob - token_log_probs(model, batch, temperature=1.0))) > 1e-3
    hidden, _ = model(batch["inputs"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"])
    log_p = jax.nn.log_softmax(hidden @ model.output_weights() / 0.7)
    np.testing.assert_allclose(entropy, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_weight_min": -0.1}, "is_weight_min: -0.1 is negative"),
        ({"mask_low": 0.0}, "mask_low: 0.0 is not positive"),
        ({"dual_clip": 0.5}, "dual_clip: 0.5 is not above 1"),
        ({"rollout_correction": "mask", "rollout_correction_min": 1.5}, "must enclose 1"),
        ({"reduction": "constant"}, "constant_length: positive"),
        ({"kl_in": "reward", "kl_estimator": "probability_gap"}, "has a meaning in the loss only"),
    ],
)
def test_settings_that_cannot_be_are_told(change, message):
    assert any(message in problem for problem in dataclasses.replace(PPO, **change).problems())
