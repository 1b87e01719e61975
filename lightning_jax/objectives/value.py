"""The value objective of PPO: predictions of a value model against returns, clipped around those of the rollouts' time.

    loss = coefficient * mean over tokens of max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2

Sources: GAE (arXiv 1506.02438) section 5; the clip, "The 37 Implementation Details of PPO" (Huang and others, 2022),
detail 9, as Tulu 3 (arXiv 2411.15124) section 6 trains with it.

Shapes: B batch, T sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax.models import ModelConfig, RouterSums
from lightning_jax.models.reward_model import RewardModel
from lightning_jax.objectives.forward import masked_sum, training_forward
from lightning_jax.objectives.routing import router_loss

# Of a batch, each [B, T]: where a value is predicted, what it was as the rollouts began, and what it should have been.
VALUE_MASK, VALUES, RETURNS = "value_mask", "values", "returns"


class ValueSums(NamedTuple):
    """Sums over tokens where a value is predicted, but for the last two."""

    loss: jax.Array
    clipped: jax.Array  # predictions without gradient
    values: jax.Array
    returns: jax.Array
    squared_returns: jax.Array
    errors: jax.Array
    squared_errors: jax.Array
    targets: jax.Array  # how many
    tokens: jax.Array  # inputs that are not padding
    router: RouterSums | None


@dataclass(frozen=True)
class Value:
    """The objective of a value model.

    Args:
        clip: how far from the old prediction the new one counts; 0 for however far.
        coefficient: of the loss.
    """

    config: ModelConfig
    clip: float
    coefficient: float
    rope_theta: float | jax.Array | None = None  # replaces the model's

    def sums(self, model: RewardModel, batch: dict[str, jax.Array]) -> ValueSums:
        """What a batch, or a part of one, adds to the loss."""
        value_BT, router = training_forward(model, batch, self.rope_theta)
        return self.sums_of_values(value_BT, router, batch)

    def sums_of_values(self, value_BT: jax.Array, router: RouterSums | None, batch: dict[str, jax.Array]) -> ValueSums:
        """`sums`, from what the model predicts."""
        mask_BT, return_BT, old_BT = batch[VALUE_MASK], batch[RETURNS], batch[VALUES]
        error_BT = value_BT - return_BT
        squared_BT, clipped_BT = error_BT**2, jnp.zeros_like(mask_BT)
        loss_BT = squared_BT
        if self.clip:
            near_BT = jnp.clip(value_BT, old_BT - self.clip, old_BT + self.clip)
            loss_BT = jnp.maximum(squared_BT, (near_BT - return_BT) ** 2)
            clipped_BT = loss_BT > squared_BT

        def total(x_BT: jax.Array) -> jax.Array:
            return masked_sum(x_BT, mask_BT, value_BT.dtype)

        return ValueSums(
            loss=total(loss_BT / 2),
            clipped=total(clipped_BT),
            values=total(value_BT),
            returns=total(return_BT),
            squared_returns=total(return_BT**2),
            errors=total(error_BT),
            squared_errors=total(squared_BT),
            targets=total(mask_BT),
            tokens=jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
            router=router,
        )

    def loss(self, sums: ValueSums) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics: `loss` is without the coefficient."""
        count = jnp.maximum(sums.targets, 1)
        auxiliary, metrics = router_loss(self.config, sums.router, sums.tokens)

        def variance(total: jax.Array, squares: jax.Array) -> jax.Array:
            return squares / count - (total / count) ** 2

        spread = variance(sums.returns, sums.squared_returns)
        unexplained = variance(sums.errors, sums.squared_errors)
        loss = sums.loss / count
        return self.coefficient * loss + auxiliary, metrics | {
            "loss": loss,
            "mean": sums.values / count,
            "explained_variance": jnp.where(spread > 0, 1 - unexplained / jnp.where(spread > 0, spread, 1), 0),
            "clip_share": sums.clipped / count,
        }
