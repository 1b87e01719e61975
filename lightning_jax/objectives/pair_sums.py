"""What preference tuning and reward models share: a batch's pairs as sums, and these as a loss and metrics.

Shapes: B batch, T sequence, P places for pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax.models import ModelConfig, RouterSums
from lightning_jax.objectives.routing import router_loss


class PairSums(NamedTuple):
    """They add across micro-batches and devices.

    Attributes:
        pairs: how many there are.
        values: sums over them of the loss and of each metric, by name.
        tokens: inputs that are not padding.
    """

    pairs: jax.Array
    values: dict[str, jax.Array]
    tokens: jax.Array
    router: RouterSums | None


def sum_over_pairs(
    kind: str,
    loss_BP: jax.Array,
    chosen_BP: jax.Array,
    rejected_BP: jax.Array,
    *,
    is_pair_BP: jax.Array,
    segment_ids_BT: jax.Array,
    router: RouterSums | None,
    **metrics_BP: jax.Array,
) -> PairSums:
    """The sums of a batch, or of a part of one.

    Args:
        kind: what the chosen and rejected values are called in the metrics: reward, score.
        metrics_BP: further ones, by name.
    """
    values_BP = {
        "loss": loss_BP,
        "accuracy": (jnp.sign(chosen_BP - rejected_BP) + 1) / 2,  # a tie is half
        "margin": chosen_BP - rejected_BP,
        f"chosen_{kind}": chosen_BP,
        f"rejected_{kind}": rejected_BP,
        **metrics_BP,
    }
    return PairSums(
        pairs=jnp.sum(is_pair_BP, dtype=loss_BP.dtype),
        values={name: jnp.sum(each_BP, where=is_pair_BP) for name, each_BP in values_BP.items()},
        tokens=jnp.sum(segment_ids_BT > 0, dtype=jnp.float32),
        router=router,
    )


def mean_over_pairs(config: ModelConfig, sums: PairSums) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The scalar to minimise, and metrics: means over pairs."""
    means = {name: total / jnp.maximum(sums.pairs, 1) for name, total in sums.values.items()}
    auxiliary, metrics = router_loss(config, sums.router, sums.tokens)
    return means["loss"] + auxiliary, metrics | means | {"pairs": sums.pairs}
