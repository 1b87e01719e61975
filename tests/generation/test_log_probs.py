"""Recorded log-probabilities against the trainer's: equal in fp32, near in bf16, and the gap that says how near."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_generation import CONFIG, PROMPTS, SETTINGS, model, ordered

from lightning_jax.generation import Generator, Sampling, completion_batch, log_prob_gap, token_log_probs

TEMPERATURE = 0.7


@functools.cache
def generated_and_trained(compute_dtype, temperature):
    """Log-probabilities [prompts, T] of completions, as generated and as the trainer sees them; mask; the batch."""
    params = nnx.state(model(compute_dtype), nnx.Param)
    sampling = Sampling(max_new_tokens=20, temperature=temperature, top_p=0.9, repetition_penalty=1.1)
    config = dataclasses.replace(CONFIG, compute_dtype=compute_dtype)
    completions = ordered(Generator(config, params, SETTINGS).generate(PROMPTS, sampling))
    batch = completion_batch(PROMPTS, [completion.ids for completion in completions], 64)
    generated = np.zeros(batch["targets"].shape, np.float32)
    generated[batch["loss_mask"]] = np.concatenate([completion.log_probs for completion in completions])

    return generated, trained(compute_dtype, batch, temperature), batch["loss_mask"], batch


def trained(compute_dtype, batch, temperature):
    graphdef, params = nnx.split(model(compute_dtype), nnx.Param)
    return jax.jit(lambda p, batch: token_log_probs(nnx.merge(graphdef, p), batch, temperature=temperature))(
        params, batch
    )


@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.0])
def test_fp32_log_probs_equal_the_training_forwards(temperature):
    gap = log_prob_gap(*generated_and_trained("float32", temperature)[:3])
    assert gap["log_prob_gap_max"] < 1e-5
    assert gap["probability_correlation"] > 1 - 1e-6


def test_bf16_log_probs_are_as_near_the_training_forwards_as_that_is_to_fp32():
    """Both round, each in its own order; with these large weights by 0.02 nats in the mean."""
    generated, in_bf16, mask, batch = generated_and_trained("bfloat16", TEMPERATURE)
    gap = log_prob_gap(generated, in_bf16, mask)
    rounding = log_prob_gap(trained("float32", batch, TEMPERATURE), in_bf16, mask)
    assert 1e-4 < gap["log_prob_gap_mean"] < 1.25 * rounding["log_prob_gap_mean"]
    assert gap["probability_correlation"] > 0.998


def test_a_wrong_temperature_shows_in_the_gap():
    generated, _, mask, batch = generated_and_trained("float32", TEMPERATURE)
    gap = log_prob_gap(generated, trained("float32", batch, 1.0), mask)
    assert gap["log_prob_gap_max"] > 0.1


def test_the_gap_is_that_of_the_masked_tokens():
    generated, trained = np.log([[0.5, 0.2, 0.9], [0.1, 0.3, 0.9]]), np.log([[0.4, 0.3, 0.1], [0.1, 0.35, 0.1]])
    mask = np.array([[True, True, False]] * 2)
    gap = log_prob_gap(jnp.asarray(generated), jnp.asarray(trained), mask)
    differences = np.abs(generated - trained)[mask]
    np.testing.assert_allclose(gap["log_prob_gap_max"], differences.max(), rtol=1e-5)
    np.testing.assert_allclose(gap["log_prob_gap_mean"], differences.mean(), rtol=1e-5)
    expected = np.corrcoef(np.exp(generated)[mask], np.exp(trained)[mask])[0, 1]
    np.testing.assert_allclose(gap["probability_correlation"], expected, rtol=1e-4)


def test_a_batch_of_completions_masks_their_tokens():
    batch = completion_batch([[7, 8], [9]], [[1, 2], [3]], 5)
    np.testing.assert_array_equal(batch["inputs"], [[7, 8, 1, 0, 0], [9, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["targets"], [[8, 1, 2, 0, 0], [3, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["loss_mask"], [[False, True, True, False, False], [True] + [False] * 4])
