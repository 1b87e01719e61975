"""A reward model: any of our language models with a scalar head in place of its vocabulary.

Source: Tulu 3 (arXiv 2411.15124) and the recipe it follows (arXiv 2403.17031): the head starts as Normal(0, 1 / sqrt(
hidden size + 1)) and has no bias. The backbone keeps its output weights, which no score depends on, so that it loads
from and goes back to the language model that it is.

Shapes: B batch, T sequence, D model dim.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from lightning_jax.models.config import ModelConfig
from lightning_jax.models.hybrid import HybridLM
from lightning_jax.models.moe import RouterSums
from lightning_jax.models.operators import ONE_DEVICE, Operators


class RewardModel(nnx.Module):
    """A backbone and the head that scores what stands up to a token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, operators: Operators = ONE_DEVICE):
        self.backbone = HybridLM(config, rngs=rngs, operators=operators)
        D = config.hidden_size
        head_D = jax.random.normal(rngs.params(), (D,), jnp.float32) / math.sqrt(D + 1)
        self.head = nnx.Param(head_D.astype(config.param_dtype), logical_axes=("embed",))

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        rope_theta: jax.Array | float | None = None,
    ) -> tuple[jax.Array, RouterSums | None]:
        """The score [B, T] of what stands up to each token, in at least fp32, and the router's sums."""
        hidden_BTD, router = self.backbone(
            tokens_BT, segment_ids_BT=segment_ids_BT, positions_BT=positions_BT, rope_theta=rope_theta
        )
        wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
        # A sum of products, which no device rounds as it would the factors of a matrix product.
        return jnp.sum(hidden_BTD.astype(wide) * self.head[...].astype(wide), axis=-1), router
