"""What experts add to any objective: their balance loss over the global batch, and metrics of their load.

Source: MiniMax-01 (arXiv 2501.08313) section 2.1.

Shapes: L layers, E experts.
"""

import jax
import jax.numpy as jnp

from lightning_jax.models import ModelConfig, RouterSums
from lightning_jax.models.moe import router_auxiliary_loss


def router_loss(
    config: ModelConfig, router: RouterSums | None, tokens: jax.Array
) -> tuple[jax.Array | float, dict[str, jax.Array]]:
    """(what to add to the loss, metrics) from sums over `tokens` tokens; (0, nothing) for dense models."""
    if router is None:
        return 0.0, {}
    auxiliary = router_auxiliary_loss(config, router, tokens)
    assignments = jnp.maximum(tokens, 1) * config.experts_per_token
    # 1 is an even share of the layer's assignments.
    load_LE = router.load_E * (config.num_experts / assignments)
    return auxiliary, {
        "auxiliary_loss": auxiliary,
        "expert_load": load_LE,
        "expert_load_max": jnp.max(load_LE),
        "expert_load_min": jnp.min(load_LE),
        "dropped_fraction": jnp.mean(router.dropped) / assignments,
    }
