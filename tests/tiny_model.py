"""A hybrid model with experts, small enough for every test; a test names what it needs to be different."""

import dataclasses
from typing import Any

from lightning_jax.models import ModelConfig

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    layer_pattern=("lightning", "softmax"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rotary_dim=2,
    rope_theta=10_000.0,
    rope_scaling=None,
    lightning_norm_eps=1e-6,
    attention_implementation="auto",
    lightning_implementation="auto",
    intermediate_size=16,
    num_experts=4,
    experts_per_token=2,
    expert_dispatch="auto",
    capacity_factor=1.0,
    capacity_group=8192,
    router_aux_loss="paper",
    router_aux_coefficient=0.01,
    norm_placement="post",
    residual_alpha=1.5,
    residual_beta=1.0,
    rms_norm_eps=1e-5,
    tie_embeddings=False,
    initializer="normal",
    initializer_range=0.02,
    param_dtype="float32",
    compute_dtype="float32",
    logits_dtype="float32",
    loss_chunk=16,
    remat="none",
)


def tiny_model(**changes: Any) -> ModelConfig:
    """The tiny model with these fields changed."""
    return dataclasses.replace(TINY, **changes)
