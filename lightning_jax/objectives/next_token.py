"""Next-token prediction: the cross-entropy of a batch's targets, plus the experts' balance loss.

Pre-training predicts every token; supervised fine-tuning is the same on the tokens that the assistant wrote, which is a
matter of the batch's loss mask. Two reductions: "token_mean" over all targets of the global batch, whatever the
micro-batches, and "conversation_sum", each conversation's sum, averaged over the conversations: what Tulu 3 (arXiv
2411.15124 section 4.3.2) calls sum loss, where a micro-batch is one conversation. Long answers weigh more in it.

Shapes: B batch, T sequence.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax.models import HybridLM, ModelConfig, RouterSums
from lightning_jax.objectives.cross_entropy import cross_entropy_sum
from lightning_jax.objectives.forward import training_forward
from lightning_jax.objectives.routing import router_loss
from lightning_jax.objectives.segments import segment_sums


class NextTokenSums(NamedTuple):
    """Sums over tokens; they add across micro-batches and devices."""

    cross_entropy: jax.Array  # nats, over the targets that count
    targets: jax.Array  # how many count, fp32
    tokens: jax.Array  # inputs that are not padding, fp32
    router: RouterSums | None
    conversations: jax.Array | None = None  # segments with a target, fp32; only where the reduction asks for them


@dataclass(frozen=True)
class NextToken:
    """The objective of pre-training, context extension and supervised fine-tuning."""

    config: ModelConfig
    rope_theta: float | jax.Array | None = None  # replaces the model's
    reduction: Literal["token_mean", "conversation_sum"] = "token_mean"

    def sums(self, model: HybridLM, batch: dict[str, jax.Array]) -> NextTokenSums:
        """What a batch, or a part of one, adds to the loss."""
        hidden_BTD, router = training_forward(model, batch, self.rope_theta)

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
            conversations=None if self.reduction == "token_mean" else _conversations(batch),
        )

    def loss(self, sums: NextTokenSums) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics: `loss` is the cross-entropy alone, in nats per token."""
        per_token = sums.cross_entropy / jnp.maximum(sums.targets, 1)
        auxiliary, metrics = router_loss(self.config, sums.router, sums.tokens)
        metrics |= {"loss": per_token, "targets": sums.targets}
        if sums.conversations is None:
            return per_token + auxiliary, metrics
        metrics["conversations"] = sums.conversations
        return sums.cross_entropy / jnp.maximum(sums.conversations, 1) + auxiliary, metrics


def _conversations(batch: dict[str, jax.Array]) -> jax.Array:
    targets_BT = segment_sums(batch["loss_mask"].astype(jnp.float32), batch["segment_ids"])
    return jnp.sum(targets_BT > 0, dtype=jnp.float32)
