"""The value objective equals other trainers', sees each token once, and its gradient is that of its loss."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from tiny_model import tiny_model

from lightning_jax.models import RewardModel
from lightning_jax.objectives import Value
from lightning_jax.objectives.value import RETURNS, VALUE_MASK, VALUES
from lightning_jax.train_step import accumulated_sums

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "ppo.npz")
B, T = GOLDEN["values"].shape
CLIP = 0.3
EXACT = {"param_dtype": "float64", "compute_dtype": "float64", "logits_dtype": "float64"}
MODEL = tiny_model(**EXACT, num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=4, num_experts=0, experts_per_token=0)
PREDICTED = GOLDEN["predicted"]


def golden_batch(oracle: str) -> dict[str, jax.Array]:
    """The completions of the goldens, a row for each; values behind the end count where that trainer counts them."""
    length = GOLDEN["length"][:, None] + (oracle != "verl")
    mask = np.arange(T) < length
    return {
        VALUE_MASK: jnp.asarray(mask),
        VALUES: jnp.asarray(GOLDEN["values"]),
        RETURNS: jnp.asarray(GOLDEN[f"returns/{oracle}"]),
        "segment_ids": jnp.asarray(mask.astype(np.int32)),
    }


def loss_and_metrics(values, batch, *, clip=CLIP, coefficient=1.0):
    objective = Value(MODEL, clip, coefficient)
    return objective.loss(objective.sums_of_values(values, None, batch))


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("oracle", ["open_instruct", "open_instruct_whitened", "trl", "verl"])
def test_value_and_gradient_equal_other_trainers(oracle):
    batch = golden_batch(oracle)
    (loss, metrics), gradient = jax.value_and_grad(loss_and_metrics, has_aux=True)(jnp.asarray(PREDICTED), batch)
    np.testing.assert_allclose(loss, GOLDEN[f"value_loss/{oracle}"], rtol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"value_gradient/{oracle}"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(metrics["clip_share"], GOLDEN[f"clip_share/{oracle}"], rtol=1e-6)
    assert 0 < metrics["clip_share"] < 1


def test_the_gradient_is_that_of_the_loss():
    batch = golden_batch("verl")
    check_grads(lambda x: loss_and_metrics(x, batch)[0], (jnp.asarray(PREDICTED),), 1, modes=["rev"], rtol=1e-6)


def test_clipping_never_makes_the_loss_less():
    """A prediction that came nearer by more than the clip counts as if it had not: no gradient drives it further."""
    batch = golden_batch("verl")
    clipped, plain = (loss_and_metrics(jnp.asarray(PREDICTED), batch, clip=clip)[0] for clip in (CLIP, 0.0))
    assert clipped > plain
    by_hand = np.sum((PREDICTED - GOLDEN["returns/verl"])[np.asarray(batch[VALUE_MASK])] ** 2) / 2
    np.testing.assert_allclose(plain, by_hand / GOLDEN["length"].sum(), rtol=1e-12)


def test_the_coefficient_scales_what_is_minimised_and_not_what_is_reported():
    batch = golden_batch("verl")
    loss, metrics = loss_and_metrics(jnp.asarray(PREDICTED), batch, coefficient=0.1)
    np.testing.assert_allclose(loss, 0.1 * metrics["loss"], rtol=1e-12)


def test_explained_variance_is_that_of_the_returns():
    batch = golden_batch("verl")
    mask = np.asarray(batch[VALUE_MASK])
    returns, predicted = GOLDEN["returns/verl"][mask], PREDICTED[mask]
    _, metrics = loss_and_metrics(jnp.asarray(PREDICTED), batch)
    np.testing.assert_allclose(metrics["explained_variance"], 1 - np.var(returns - predicted) / np.var(returns))
    np.testing.assert_allclose(metrics["mean"], predicted.mean())
    _, metrics = loss_and_metrics(batch[RETURNS] + 3.0, batch)
    np.testing.assert_allclose(metrics["explained_variance"], 1.0)  # a constant error explains all that varies
    _, metrics = loss_and_metrics(jnp.asarray(PREDICTED), batch | {RETURNS: jnp.zeros((B, T))})
    assert metrics["explained_variance"] == 0


def test_only_asked_values_count_and_however_rows_are_divided():
    batch = golden_batch("verl")
    objective = Value(MODEL, CLIP, 1.0)
    whole = loss_and_metrics(jnp.asarray(PREDICTED), batch)[0]
    padded = {name: jnp.pad(values, ((0, 4), (0, 3)), constant_values=0) for name, values in batch.items()}
    more = loss_and_metrics(jnp.pad(jnp.asarray(PREDICTED), ((0, 4), (0, 3)), constant_values=9.0), padded)[0]
    np.testing.assert_allclose(more, whole, rtol=1e-12)
    rows = batch | {"predicted": jnp.asarray(PREDICTED)}

    def sums(part):
        return objective.sums_of_values(part["predicted"], None, part)

    for count in (2, 3, 6):
        parts = objective.loss(accumulated_sums(sums, rows, count))[0]
        np.testing.assert_allclose(parts, whole, rtol=1e-9)


def test_a_value_sees_what_stands_before_the_token_and_nothing_behind_it():
    model = RewardModel(MODEL, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (1, 8))
    batch = {"inputs": jnp.asarray(tokens), "segment_ids": jnp.ones((1, 8), jnp.int32)}
    batch |= {"positions": jnp.arange(8)[None], VALUE_MASK: jnp.ones((1, 8), bool)}
    batch |= {VALUES: jnp.zeros((1, 8)), RETURNS: jnp.zeros((1, 8))}

    def values_before(place):
        mask = jnp.arange(8)[None] < place
        return Value(MODEL, 0.0, 1.0).sums(model, batch | {VALUE_MASK: mask}).values

    changed = batch["inputs"].at[0, 5].add(1)
    before = [values_before(5), values_before(6)]
    batch["inputs"] = changed
    assert values_before(5) == before[0]
    assert values_before(6) != before[1]
