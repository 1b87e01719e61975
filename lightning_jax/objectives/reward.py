"""Training a reward model on preferences: Bradley-Terry, with an optional margin and centring.

Sources: arXiv 2203.02155 section 3.5; the margin, Llama 2 (arXiv 2307.09288) section 3.2.2; centring, arXiv 2312.09244.

The score of a chat is read at its last token, which is found by its place in the row: no token id says where it ends.

Shapes: B batch, T sequence, P places for pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax.models import ModelConfig, RouterSums
from lightning_jax.models.reward_model import RewardModel
from lightning_jax.objectives.config import RewardModelConfig
from lightning_jax.objectives.routing import router_loss
from lightning_jax.objectives.segments import last_tokens, pairs, segment_sums


class RewardSums(NamedTuple):
    """Sums over pairs, but for the last two, which are over tokens."""

    pairs: jax.Array
    loss: jax.Array
    chosen_score: jax.Array
    rejected_score: jax.Array
    correct: jax.Array  # pairs whose chosen score is the larger; a tie is half
    tokens: jax.Array
    router: RouterSums | None


def segment_scores(
    model: RewardModel, batch: dict[str, jax.Array], rope_theta: float | jax.Array | None = None
) -> tuple[jax.Array, RouterSums | None]:
    """The score [B, T] of each segment, and what the router did."""
    score_BT, router = model(
        batch["inputs"],
        segment_ids_BT=batch["segment_ids"],
        positions_BT=batch["positions"],
        rope_theta=rope_theta,
    )
    ends_BT = last_tokens(batch["segment_ids"])
    return segment_sums(jnp.where(ends_BT, score_BT, 0), batch["segment_ids"]), router


def reward_loss(
    settings: RewardModelConfig, chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0
) -> jax.Array:
    """The loss of each pair of scores."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + settings.centring * (chosen + rejected) ** 2


@dataclass(frozen=True)
class Reward:
    """The objective of a reward model."""

    config: ModelConfig
    settings: RewardModelConfig
    rope_theta: float | jax.Array | None = None  # replaces the model's

    def sums(self, model: RewardModel, batch: dict[str, jax.Array]) -> RewardSums:
        """What a batch, or a part of one, adds to the loss; the margin of a pair is that of its chosen chat."""
        score_BT, router = segment_scores(model, batch, self.rope_theta)
        chosen_BP, rejected_BP = pairs(score_BT)
        margin_BP = pairs(batch["margin"])[0] if self.settings.use_margin else 0.0
        # A second segment there is where its first token is.
        length_BT = segment_sums(jnp.ones_like(score_BT), batch["segment_ids"])
        is_pair_BP = pairs(length_BT)[1] > 0

        def total(values_BP: jax.Array) -> jax.Array:
            return jnp.sum(values_BP, where=is_pair_BP)

        return RewardSums(
            pairs=total(jnp.ones_like(chosen_BP)),
            loss=total(reward_loss(self.settings, chosen_BP, rejected_BP, margin_BP)),
            chosen_score=total(chosen_BP),
            rejected_score=total(rejected_BP),
            correct=total((jnp.sign(chosen_BP - rejected_BP) + 1) / 2),
            tokens=jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
            router=router,
        )

    def loss(self, sums: RewardSums) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics: means over pairs."""
        count = jnp.maximum(sums.pairs, 1)
        auxiliary, metrics = router_loss(self.config, sums.router, sums.tokens)
        loss = sums.loss / count
        return loss + auxiliary, metrics | {
            "loss": loss,
            "accuracy": sums.correct / count,
            "margin": (sums.chosen_score - sums.rejected_score) / count,
            "chosen_score": sums.chosen_score / count,
            "rejected_score": sums.rejected_score / count,
            "pairs": sums.pairs,
        }
