"""Rotary embedding against complex multiplication in fp64, and Llama 3.1's frequency scaling against its definition."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_config import LLAMA

from lightning_jax.models import RopeScaling
from lightning_jax.models.rope import rope_frequencies, rotate, rotation

CONFIG = dataclasses.replace(LLAMA, num_heads=2, num_kv_heads=2, head_dim=12, rotary_dim=8, rope_theta=1e4)


def rotated_by_complex_numbers(x, positions, theta, rotary_dim):
    x, half = np.asarray(x, np.float64), rotary_dim // 2
    angles = positions[..., None] * theta ** (-2 * np.arange(half) / rotary_dim)
    pairs = (x[..., :half] + 1j * x[..., half:rotary_dim]) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([pairs.real, pairs.imag, x[..., rotary_dim:]], axis=-1)


@pytest.mark.parametrize("rotary_dim", [0, 2, 8, 12])
def test_leading_dimensions_rotate_and_the_rest_passes(rotary_dim):
    config = dataclasses.replace(CONFIG, rotary_dim=rotary_dim)
    x_BTHK = np.random.default_rng(0).standard_normal((2, 9, 2, 12), np.float32)
    positions_BT = np.array([np.arange(9), [0, 1, 2, 3, 0, 1, 2, 0, 1000]])
    ours = rotate(jnp.asarray(x_BTHK), rotation(config, jnp.asarray(positions_BT)))
    np.testing.assert_allclose(
        ours, rotated_by_complex_numbers(x_BTHK, positions_BT, 1e4, rotary_dim), rtol=1e-5, atol=1e-4
    )


def test_scores_depend_on_relative_positions_only():
    x_BTHK = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 2, 12), np.float32))

    def score(query, key):
        at = [rotate(x, rotation(CONFIG, jnp.array([[p]]))) for x, p in ((x_BTHK[:1], query), (x_BTHK[1:], key))]
        return jnp.sum(at[0] * at[1])

    np.testing.assert_allclose(score(17, 5), score(112, 100), rtol=1e-4)


def test_theta_may_be_traced_and_replaces_the_configs():
    positions_BT = jnp.arange(7)[None]
    traced = jax.jit(lambda theta: rotation(CONFIG, positions_BT, theta))(5e6)
    expected = rotation(dataclasses.replace(CONFIG, rope_theta=5e6), positions_BT)
    np.testing.assert_allclose(traced.cos_BT1R, expected.cos_BT1R, rtol=1e-6)
    np.testing.assert_allclose(traced.sin_BT1R, expected.sin_BT1R, rtol=1e-6, atol=1e-7)


def test_llama_3_1_scaling_keeps_short_waves_stretches_long_ones_and_blends_between():
    scaling = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_length=8192)
    config = dataclasses.replace(CONFIG, head_dim=128, rotary_dim=128, rope_theta=5e5, rope_scaling=scaling)
    expected = []
    for i in range(64):
        f = 5e5 ** (-2 * i / 128)
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            expected.append(f)
        elif wavelength > 8192:
            expected.append(f / 8)
        else:
            s = (8192 / wavelength - 1) / 3
            expected.append((1 - s) * f / 8 + s * f)
    np.testing.assert_allclose(rope_frequencies(config, config.rope_theta), expected, rtol=2e-6)


def test_the_dtype_is_kept():
    x_BTHK = jnp.ones((1, 3, 2, 12), jnp.bfloat16)
    assert rotate(x_BTHK, rotation(CONFIG, jnp.arange(3)[None])).dtype == jnp.bfloat16
