"""What every objective begins with, the forward of a training batch, and sums over the tokens that count.

Shapes: B batch, T sequence, D of a vector.
"""

import jax
import jax.numpy as jnp

from lightning_jax.models import HybridLM, RouterSums
from lightning_jax.models.reward_model import RewardModel


def training_forward(
    model: HybridLM | RewardModel, batch: dict[str, jax.Array], rope_theta: float | jax.Array | None = None
) -> tuple[jax.Array, RouterSums | None]:
    """The hidden vectors [B, T, D] of a batch, of a reward model its scores [B, T], and the router's sums."""
    return model(
        batch["inputs"],
        segment_ids_BT=batch["segment_ids"],
        positions_BT=batch["positions"],
        rope_theta=rope_theta,
    )


def masked_sum(values_BT: jax.Array, mask_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The sum over the mask; what stands elsewhere may be anything."""
    return jnp.sum(jnp.where(mask_BT, values_BT, 0), dtype=dtype)
