"""Training a reward model on preferences: Bradley-Terry, with an optional margin and centring.

Sources: arXiv 2203.02155 section 3.5; the margin, Llama 2 (arXiv 2307.09288) section 3.2.2; centring, arXiv 2312.09244.

The score of a chat is read at its last token, which is found by its place in the row: no token id says where it ends.

Shapes: B batch, T sequence, P places for pairs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lightning_jax.models import ModelConfig, RouterSums
from lightning_jax.models.reward_model import RewardModel
from lightning_jax.objectives.config import RewardModelConfig
from lightning_jax.objectives.forward import training_forward
from lightning_jax.objectives.pair_sums import PairSums, mean_over_pairs, sum_over_pairs
from lightning_jax.objectives.segments import last_tokens, pairs, segment_sums


def segment_scores(
    model: RewardModel, batch: dict[str, jax.Array], rope_theta: float | jax.Array | None = None
) -> tuple[jax.Array, RouterSums | None]:
    """The score [B, T] of each segment, and what the router did."""
    score_BT, router = training_forward(model, batch, rope_theta)
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

    def sums(self, model: RewardModel, batch: dict[str, jax.Array]) -> PairSums:
        """What a batch, or a part of one, adds to the loss; the margin of a pair is that of its chosen chat."""
        segment_ids_BT = batch["segment_ids"]
        score_BT, router = segment_scores(model, batch, self.rope_theta)
        chosen_BP, rejected_BP = pairs(score_BT)
        margin_BP = pairs(batch["margin"])[0] if self.settings.use_margin else 0.0
        length_BT = segment_sums(jnp.ones_like(score_BT), segment_ids_BT)
        return sum_over_pairs(
            "score",
            reward_loss(self.settings, chosen_BP, rejected_BP, margin_BP),
            chosen_BP,
            rejected_BP,
            is_pair_BP=pairs(length_BT)[1] > 0,
            segment_ids_BT=segment_ids_BT,
            router=router,
        )

    def loss(self, sums: PairSums) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics: means over pairs."""
        return mean_over_pairs(self.config, sums)
