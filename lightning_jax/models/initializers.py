"""How weights start, by their role in the network.

Sources: DeepNet (arXiv 2203.00555) section 4, which MiniMax-01 (arXiv 2501.08313) section 4.2 names with Xavier
initialisation and gains alpha = (2N)^1/4, beta = (8N)^-1/4 without saying which weights take beta: the assignment here
is DeepNet's. TinyLlama (arXiv 2401.02385), `lit_gpt/model.py`.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from lightning_jax.models.config import ModelConfig

Role = Literal[
    "embedding",
    "head",
    "query_key",
    "value",
    "attention_output",
    "gate",
    "router",
    "feed_forward_in",
    "feed_forward_out",
]
Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def weight(config: ModelConfig, role: Role, fan_in: int, fan_out: int) -> Initializer:
    """The initializer (key, shape, dtype) -> array of a weight that maps `fan_in` inputs to `fan_out` outputs."""
    deviation = standard_deviation(config, role, fan_in, fan_out)

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return (deviation * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return initialize


def standard_deviation(config: ModelConfig, role: Role, fan_in: int, fan_out: int) -> float:
    """The standard deviation of the normal distribution that a weight of this role is drawn from."""
    if config.initializer == "normal":
        return config.initializer_range
    if config.initializer == "tinyllama":
        if role in ("attention_output", "feed_forward_out"):
            return 1 / (math.sqrt(config.hidden_size) * config.num_layers)
        return math.sqrt(2 / (5 * config.hidden_size))
    if role == "embedding":
        # A lookup has no fan in; unit-norm rows keep well above the epsilon of the norm that follows.
        return 1 / math.sqrt(config.hidden_size)
    scaled = role in ("value", "attention_output", "feed_forward_in", "feed_forward_out")
    gain = (8 * config.num_layers) ** -0.25 if scaled else 1.0
    return gain * math.sqrt(2 / (fan_in + fan_out))
