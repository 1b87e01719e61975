"""Rotary position embedding on the leading dimensions of each head, half-split pairs (i, i + R/2).

Sources: RoFormer (arXiv 2104.09864) equation 34; MiniMax-01 (arXiv 2501.08313) section 2, half of each head rotates;
Llama 3.1's frequency scaling (arXiv 2407.21783, released `rope_scaling`).

Shapes: B batch, T sequence, H heads, K head dim, R rotary dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax.models.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """The angles of every token, as cosines and sines, fp32 [B, T, 1, R/2]."""

    cos_BT1R: jax.Array
    sin_BT1R: jax.Array


def rotation(config: ModelConfig, positions_BT: jax.Array, theta: jax.Array | float | None = None) -> Rotation:
    """Rotation of tokens at `positions_BT`; `theta`, traced or not, replaces the config's rope_theta."""
    frequencies_R = rope_frequencies(config, config.rope_theta if theta is None else theta)
    angles_BT1R = positions_BT[..., None, None].astype(jnp.float32) * frequencies_R
    return Rotation(jnp.cos(angles_BT1R), jnp.sin(angles_BT1R))


def rope_frequencies(config: ModelConfig, theta: jax.Array | float) -> jax.Array:
    """Angular frequencies [R/2] in radians per token, theta^(-2i/R), fp32, scaled as the config says."""
    exponents_R = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
    frequencies_R = 1.0 / jnp.asarray(theta, jnp.float32) ** exponents_R
    return scale_frequencies(frequencies_R, config.rope_scaling) if config.rope_scaling else frequencies_R


def scale_frequencies(frequencies_R: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Slows wavelengths that the original context could not hold by `factor`, keeps short ones, blends between."""
    turns_R = scaling.original_context_length * frequencies_R / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep_R = jnp.clip((turns_R - low) / (high - low), 0.0, 1.0)
    return keep_R * frequencies_R + (1 - keep_R) * frequencies_R / scaling.factor


def rotate(x_BTHK: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the leading R dimensions of each head and passes the rest through; keeps the dtype."""
    half = rotation.cos_BT1R.shape[-1]
    first, second, rest = jnp.split(x_BTHK, (half, 2 * half), axis=-1)
    cos, sin = rotation
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([part.astype(x_BTHK.dtype) for part in rotated] + [rest], axis=-1)
