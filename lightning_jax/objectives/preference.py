"""Preference tuning without a reward model: DPO, its length-normalised form, and IPO.

Sources: DPO, arXiv 2305.18290; length-normalised, Tulu 3 (arXiv 2411.15124) section 5.1.2; IPO, arXiv 2310.12036.

The reference's log-probabilities come with the batch. A pair is two neighbouring segments of one row, the chosen chat
and the rejected one, so a loss over pairs is a sum over rows like any other.

Shapes: B batch, T sequence, P places for pairs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lightning_jax.models import HybridLM, ModelConfig, RouterSums
from lightning_jax.objectives.config import PreferenceConfig
from lightning_jax.objectives.cross_entropy import target_log_probs
from lightning_jax.objectives.forward import training_forward
from lightning_jax.objectives.pair_sums import PairSums, mean_over_pairs, sum_over_pairs
from lightning_jax.objectives.segments import pairs, segment_sums

REFERENCE = "reference_log_probs"  # of a batch: the reference's log-probability of each segment, [B, T]


def segment_log_probs(
    model: HybridLM, config: ModelConfig, batch: dict[str, jax.Array], rope_theta: float | jax.Array | None = None
) -> tuple[jax.Array, RouterSums | None]:
    """The log-probability [B, T] of what is trained of each segment, in nats, and what the router did."""
    hidden_BTD, router = training_forward(model, batch, rope_theta)

    def log_probs(weights_DV, hidden_BTD, targets_BT, mask_BT, segment_ids_BT):
        each_BT = target_log_probs(hidden_BTD, weights_DV, targets_BT, config.loss_chunk, config.logits_dtype)
        return segment_sums(jnp.where(mask_BT, each_BT, 0), segment_ids_BT)

    rows = (hidden_BTD, batch["targets"], batch["loss_mask"], batch["segment_ids"])
    return model.operators.map_rows(log_probs, model.output_weights(), *rows), router


def preference_loss(
    settings: PreferenceConfig, chosen_ratio: jax.Array, rejected_ratio: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, chosen reward, rejected reward) of each pair.

    Args:
        chosen_ratio, rejected_ratio: log of policy over reference: sums over the answer's tokens for "dpo", means else.
    """
    delta = chosen_ratio - rejected_ratio
    if settings.loss == "ipo":
        loss = (delta - 1 / (2 * settings.beta)) ** 2
    else:
        loss = -jax.nn.log_sigmoid(settings.beta * delta)
    return loss, settings.beta * chosen_ratio, settings.beta * rejected_ratio


@dataclass(frozen=True)
class Preference:
    """The objective of preference tuning."""

    config: ModelConfig
    settings: PreferenceConfig
    rope_theta: float | jax.Array | None = None  # replaces the model's

    def sums(self, model: HybridLM, batch: dict[str, jax.Array]) -> PairSums:
        """What a batch, or a part of one, adds to the loss; a pair of which one side is not trained adds none."""
        segment_ids_BT = batch["segment_ids"]
        log_prob_BT, router = segment_log_probs(model, self.config, batch, self.rope_theta)
        length_BT = segment_sums(batch["loss_mask"].astype(log_prob_BT.dtype), segment_ids_BT)
        mean_BT = log_prob_BT / jnp.maximum(length_BT, 1)
        ratio_BT = log_prob_BT - batch[REFERENCE]
        if self.settings.loss != "dpo":
            ratio_BT = ratio_BT / jnp.maximum(length_BT, 1)
        first_BP, second_BP = pairs(length_BT)
        chosen_mean_BP, rejected_mean_BP = pairs(mean_BT)
        return sum_over_pairs(
            "reward",
            *preference_loss(self.settings, *pairs(ratio_BT)),
            is_pair_BP=(first_BP > 0) & (second_BP > 0),
            segment_ids_BT=segment_ids_BT,
            router=router,
            chosen_log_prob=chosen_mean_BP,  # over the answer's tokens
            rejected_log_prob=rejected_mean_BP,
        )

    def loss(self, sums: PairSums) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics: means over pairs."""
        return mean_over_pairs(self.config, sums)
