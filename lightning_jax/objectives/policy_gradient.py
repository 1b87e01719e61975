"""The policy-gradient objective: of every completion's tokens -weight * advantage * log-probability.

    weight = stop_gradient(clip(r, is_weight_min, is_weight_max)) * mask * correction

with r the ratio to the policy as the rollouts began. With a mask and no clip the gradient is PPO's, with a clip and no
mask CISPO's: `algorithms.py` has them by name. The value differs from PPO's, which is reported as `surrogate`.

Sources: MiniMax-M1 (arXiv 2506.13585) equations 4 to 7; truncated importance weights for rollouts of another program,
fengyao.notion.site/off-policy-rl (2025); estimators of the divergence, joschu.net/blog/kl-approx.html; its difference
of probabilities, MiniMax-01 (arXiv 2501.08313) section 5.4.2.

Shapes: B batch, T sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax.models import HybridLM, ModelConfig, RouterSums
from lightning_jax.objectives.config import PolicyGradientConfig
from lightning_jax.objectives.cross_entropy import log_probs_and_entropies
from lightning_jax.objectives.forward import masked_sum, training_forward
from lightning_jax.objectives.routing import router_loss
from lightning_jax.objectives.segments import of_tokens, segment_sums

# Of a batch, each [B, T] and about the target: the advantage; log-probabilities by the trainer as the rollouts began,
# by the program that made them, and by the model as the stage began.
ADVANTAGES, OLD, RECORDED, REFERENCE = "advantages", "old_log_probs", "recorded_log_probs", "kl_reference_log_probs"


class PolicyGradientSums(NamedTuple):
    """Sums over tokens of completions, but for the last four."""

    loss: jax.Array  # each token weighted as the reduction says
    divergence: jax.Array  # from the reference, weighted so too
    surrogate: jax.Array  # PPO's value, weighted so too
    masked: jax.Array  # tokens without gradient
    capped: jax.Array  # tokens whose importance weight was clipped
    change: jax.Array  # k3 of the divergence from the policy as the rollouts began
    entropy: jax.Array
    correction: jax.Array  # weights for the rollouts' program
    targets: jax.Array  # how many
    sequences: jax.Array
    tokens: jax.Array  # inputs that are not padding
    router: RouterSums | None


class TokenTerms(NamedTuple):
    """What each token [B, T] adds, before the reduction."""

    loss: jax.Array
    divergence: jax.Array
    surrogate: jax.Array
    masked: jax.Array
    capped: jax.Array
    change: jax.Array
    correction: jax.Array


def sequence_log_probs(
    model: HybridLM,
    config: ModelConfig,
    batch: dict[str, jax.Array],
    *,
    temperature: float,
    rope_theta: float | jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, RouterSums | None]:
    """Log-probability and entropy [B, T] of every target at the sampling temperature, in nats, and the router's sums.

    The policy, the policy as the rollouts began, and the reference are all computed by this.
    """
    hidden_BTD, router = training_forward(model, batch, rope_theta)

    def each(weights_DV, hidden_BTD, targets_BT):
        chunk, logits_dtype = config.loss_chunk, config.logits_dtype
        return log_probs_and_entropies(hidden_BTD, weights_DV, targets_BT, chunk, logits_dtype, temperature)

    log_prob_BT, entropy_BT = model.operators.map_rows(each, model.output_weights(), hidden_BTD, batch["targets"])
    return log_prob_BT, entropy_BT, router


def token_terms(config: PolicyGradientConfig, log_prob_BT: jax.Array, batch: dict[str, jax.Array]) -> TokenTerms:
    """The terms of every token; those outside `loss_mask` mean nothing."""
    advantages_BT, mask_BT = batch[ADVANTAGES], batch["loss_mask"]
    old_BT, recorded_BT = (jnp.where(mask_BT, batch[name], 0) for name in (OLD, RECORDED))
    log_prob_BT = jnp.where(mask_BT, log_prob_BT, 0)
    frozen_BT = jax.lax.stop_gradient(log_prob_BT)
    log_ratio_BT = frozen_BT - old_BT
    ratio_BT = jnp.exp(log_ratio_BT)
    if config.ratio == "sequence":
        length_BT = segment_sums(mask_BT.astype(log_ratio_BT.dtype), batch["segment_ids"])
        mean_BT = segment_sums(log_ratio_BT, batch["segment_ids"]) / jnp.maximum(length_BT, 1)
        ratio_BT = jnp.exp(of_tokens(mean_BT, batch["segment_ids"]))

    weight_BT = jnp.clip(ratio_BT, config.is_weight_min, config.is_weight_max)
    surrogate_BT = weight_BT * advantages_BT
    masked_BT = jnp.zeros_like(mask_BT)
    bounds = (
        (-1, config.mask_low and 1 - config.mask_low, jnp.less),
        (1, config.mask_high and 1 + config.mask_high, jnp.greater),
        (-1, config.dual_clip, jnp.greater),
    )
    for sign, bound, beyond in bounds:
        if bound is not None:
            outside_BT = (sign * advantages_BT > 0) & beyond(ratio_BT, bound)
            masked_BT |= outside_BT
            surrogate_BT = jnp.where(outside_BT, bound * advantages_BT, surrogate_BT)

    correction_BT = rollout_correction(config, old_BT - recorded_BT)
    loss_BT = -jnp.where(masked_BT, 0, weight_BT) * correction_BT * advantages_BT * log_prob_BT
    divergence_BT = jnp.zeros_like(loss_BT)
    if config.kl_coefficient and config.kl_in == "loss":
        divergence_BT = kl_loss(config.kl_estimator, log_prob_BT, jnp.where(mask_BT, batch[REFERENCE], 0))
    return TokenTerms(
        loss=loss_BT,
        divergence=divergence_BT,
        surrogate=-surrogate_BT * correction_BT,
        masked=masked_BT,
        capped=weight_BT != ratio_BT,
        change=kl_estimate("k3", old_BT, frozen_BT),
        correction=correction_BT,
    )


def rollout_correction(config: PolicyGradientConfig, log_ratio_BT: jax.Array) -> jax.Array:
    """The weight of every token for having been sampled by another program than the trainer's."""
    low, high = config.rollout_correction_min, config.rollout_correction_max
    ratio_BT = jnp.exp(log_ratio_BT)
    match config.rollout_correction:
        case "truncate":
            return jnp.minimum(ratio_BT, high)
        case "mask":
            return jnp.where((ratio_BT >= low) & (ratio_BT <= high), ratio_BT, 0)
    return jnp.ones_like(ratio_BT)


def kl_estimate(estimator: str, log_prob: jax.Array, reference: jax.Array) -> jax.Array:
    """An estimate of KL(policy || reference) from a token that the policy sampled: k1, k2 or k3."""
    difference = log_prob - reference
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference**2 / 2
    return jnp.expm1(-difference) + difference


def kl_loss(estimator: str, log_prob: jax.Array, reference: jax.Array) -> jax.Array:
    """What is added to the loss, where only k2 has the divergence's own gradient, and k1's is zero in the mean.

    "probability_gap" is stop_gradient(p - p_reference) log p.
    """
    if estimator == "probability_gap":
        return jax.lax.stop_gradient(jnp.exp(log_prob) - jnp.exp(reference)) * log_prob
    return kl_estimate(estimator, log_prob, reference)


@dataclass(frozen=True)
class PolicyGradient:
    """The objective of reinforcement learning.

    Args:
        temperature: of the rollouts.
    """

    config: ModelConfig
    settings: PolicyGradientConfig
    temperature: float
    rope_theta: float | jax.Array | None = None  # replaces the model's

    def sums(self, model: HybridLM, batch: dict[str, jax.Array]) -> PolicyGradientSums:
        """What a batch, or a part of one, adds to the loss."""
        log_prob_BT, entropy_BT, router = sequence_log_probs(
            model, self.config, batch, temperature=self.temperature, rope_theta=self.rope_theta
        )
        return self.sums_of_log_probs(log_prob_BT, entropy_BT, router, batch)

    def sums_of_log_probs(
        self, log_prob_BT: jax.Array, entropy_BT: jax.Array, router: RouterSums | None, batch: dict[str, jax.Array]
    ) -> PolicyGradientSums:
        """`sums`, from what the model says of the targets."""
        mask_BT, segment_ids_BT = batch["loss_mask"], batch["segment_ids"]
        terms = token_terms(self.settings, log_prob_BT, batch)
        length_BT = segment_sums(mask_BT.astype(log_prob_BT.dtype), segment_ids_BT)
        share_BT = jnp.ones_like(log_prob_BT)
        if self.settings.reduction == "sequence_mean":
            share_BT = 1 / jnp.maximum(of_tokens(length_BT, segment_ids_BT), 1)
        elif self.settings.reduction == "constant":
            share_BT = share_BT / self.settings.constant_length

        def total(x_BT: jax.Array) -> jax.Array:
            return masked_sum(x_BT, mask_BT, log_prob_BT.dtype)

        return PolicyGradientSums(
            loss=total(terms.loss * share_BT),
            divergence=total(terms.divergence * share_BT),
            surrogate=total(terms.surrogate * share_BT),
            masked=total(terms.masked),
            capped=total(terms.capped),
            change=total(terms.change),
            entropy=total(entropy_BT),
            correction=total(terms.correction),
            targets=total(mask_BT),
            sequences=jnp.sum(length_BT > 0, dtype=jnp.float32),
            tokens=jnp.sum(segment_ids_BT > 0, dtype=jnp.float32),
            router=router,
        )

    def loss(self, sums: PolicyGradientSums) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise, and metrics: `loss` is what is minimised without the divergence."""
        targets = jnp.maximum(sums.targets, 1)
        count = targets if self.settings.reduction == "token_mean" else jnp.maximum(sums.sequences, 1)
        auxiliary, metrics = router_loss(self.config, sums.router, sums.tokens)
        loss, divergence = sums.loss / count, sums.divergence / count
        return loss + self.settings.kl_coefficient * divergence + auxiliary, metrics | {
            "loss": loss,
            "surrogate": sums.surrogate / count,
            "kl": divergence,
            "policy_change": sums.change / targets,
            "entropy": sums.entropy / targets,
            "clip_share": sums.masked / targets,
            "cap_share": sums.capped / targets,
            "rollout_correction": sums.correction / targets,
            "targets": sums.targets,
        }
