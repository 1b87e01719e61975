"""Chunked cross-entropy against log_softmax over all logits in fp64, and the proof that no [B, T, V] exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.objectives.cross_entropy import cross_entropy_sum

B, T, D, V = 3, 13, 6, 40


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden, weights = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    return hidden, weights, rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.7


def reference(hidden, weights, targets, mask):
    log_probabilities = jax.nn.log_softmax(hidden @ weights)
    return -jnp.sum(jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0], where=mask)


@pytest.mark.parametrize("chunk", [1, 4, 13, 512])
def test_value_and_gradients_equal_the_definition_in_fp64(chunk):
    with jax.enable_x64(True):
        hidden, weights, targets, mask = map(jnp.asarray, inputs())
        ours = jax.value_and_grad(cross_entropy_sum, argnums=(0, 1))(hidden, weights, targets, mask, chunk, "float64")
        expected = jax.value_and_grad(reference, argnums=(0, 1))(hidden, weights, targets, mask)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), ours, expected)


def test_the_gradient_scales_with_the_cotangent():
    hidden, weights, targets, mask = map(jnp.asarray, inputs())

    def mean(hidden):
        return cross_entropy_sum(hidden, weights, targets, mask, 4, "float32") / jnp.sum(mask)

    expected = jax.grad(lambda hidden: reference(hidden, weights, targets, mask) / jnp.sum(mask))(hidden)
    np.testing.assert_allclose(jax.grad(mean)(hidden), expected, rtol=1e-5, atol=1e-6)


def test_masked_targets_may_be_anything():
    hidden, weights, targets, mask = map(jnp.asarray, inputs())
    nonsense = jnp.where(mask, targets, -100)
    arguments = (4, "float32")
    assert cross_entropy_sum(hidden, weights, nonsense, mask, *arguments) == cross_entropy_sum(
        hidden, weights, targets, mask, *arguments
    )


def test_bf16_vectors_with_fp32_logits_lose_only_the_rounding_of_their_inputs():
    hidden, weights, targets, mask = map(jnp.asarray, inputs())
    rounded = hidden.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
    ours = cross_entropy_sum(*rounded, targets, mask, 4, "float32")
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, reference(*(x.astype(jnp.float32) for x in rounded), targets, mask), rtol=1e-6)
    gradients = jax.grad(cross_entropy_sum, argnums=(0, 1))(*rounded, targets, mask, 4, "float32")
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.bfloat16]


def test_no_array_holds_the_logits_of_all_tokens():
    hidden, weights, targets, mask = map(jnp.asarray, inputs())
    call = jax.value_and_grad(lambda *x: cross_entropy_sum(*x, targets, mask, 2, "float32"), argnums=(0, 1))
    text = jax.jit(call).lower(hidden, weights).as_text()
    assert f"<{2 * B}x{V}x" in text  # a chunk's logits
    for whole in (f"{B}x{T}x{V}x", f"{B}x{T + 1}x{V}x", f"<{B * T}x{V}x", f"<{B * (T + 1)}x{V}x"):
        assert whole not in text


def test_logits_are_computed_once_for_loss_and_gradient():
    hidden, weights, targets, mask = map(jnp.asarray, inputs())
    call = jax.value_and_grad(lambda *x: cross_entropy_sum(*x, targets, mask, 2, "float32"), argnums=(0, 1))
    assert jax.jit(call).lower(hidden, weights).as_text().count("dot_general") == 3
