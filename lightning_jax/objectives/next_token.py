"""Next-token prediction: the mean cross-entropy of a batch's targets, plus the experts' balance loss.

Sources: MiniMax-01 (arXiv 2501.08313) section 2.1 for the balance loss over the global batch.

Shapes: B batch, T sequence, L layers, E experts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax.models import HybridLM, ModelConfig, RouterSums
from lightning_jax.models.moe import router_auxiliary_loss
from lightning_jax.objectives.cross_entropy import cross_entropy_sum


class NextTokenSums(NamedTuple):
    """Sums over tokens; they add across micro-batches and devices."""

    cross_entropy: jax.Array  # nats, over the targets that count
    targets: jax.Array  # how many count, fp32
    tokens: jax.Array  # inputs that are not padding, fp32
    router: RouterSums | None


@dataclass(frozen=True)
class NextToken:
    """The objective of pre-training and context extension."""

    config: ModelConfig
    rope_theta: float | jax.Array | None = None  # replaces the model's

    def sums(self, model: HybridLM, batch: dict[str, jax.Array]) -> NextTokenSums:
        """What a batch, or a part of one, adds to the loss."""
        hidden_BTD, router = model(
            batch["inputs"],
            segment_ids_BT=batch["segment_ids"],
            positions_BT=batch["positions"],
            rope_theta=self.rope_theta,
        )

        def cross_entropy(weights_DV, hidden_BTD, targets_BT, mask_BT):
            chunk, logits_dtype = self.config.loss_chunk, self.config.logits_dtype
            return cross_entropy_sum(hidden_BTD, weights_DV, targets_BT, mask_BT, chunk, logits_dtype)

        return NextTokenSums(
            cross_entropy=model.operators.sum_over_rows(
                cross_entropy, model.output_weights(), hidden_BTD, batch["targets"], batch["loss_mask"]
            ),
            targets=jnp.sum(batch["loss_mask"], dtype=jnp.float32),
            tokens=jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
            router=router,
        )

    def loss(self, sums: NextTokenSums) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics: `loss` is the cross-entropy alone, in nats per token."""
        cross_entropy = sums.cross_entropy / jnp.maximum(sums.targets, 1)
        metrics = {"loss": cross_entropy, "targets": sums.targets}
        if sums.router is None:
            return cross_entropy, metrics
        auxiliary = router_auxiliary_loss(self.config, sums.router, sums.tokens)
        assignments = jnp.maximum(sums.tokens, 1) * self.config.experts_per_token
        # 1 is an even share of the layer's assignments.
        load_LE = sums.router.load_E * (self.config.num_experts / assignments)
        metrics |= {
            "auxiliary_loss": auxiliary,
            "expert_load": load_LE,
            "expert_load_max": jnp.max(load_LE),
            "expert_load_min": jnp.min(load_LE),
            "dropped_fraction": jnp.mean(sums.router.dropped) / assignments,
        }
        return cross_entropy + auxiliary, metrics
