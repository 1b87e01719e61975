"""The algorithms of the literature as settings of the one policy-gradient objective.

What tells them apart is where the importance weight is clipped, which tokens get no gradient, and what the sum over
tokens is divided by; the advantages are another setting. All are functions of their papers' numbers.
"""

import dataclasses

from lightning_jax.objectives.config import PolicyGradientConfig

REINFORCE = PolicyGradientConfig(
    ratio="token",
    is_weight_min=1.0,
    is_weight_max=1.0,
    mask_low=None,
    mask_high=None,
    dual_clip=None,
    rollout_correction="none",
    rollout_correction_min=0.0,
    rollout_correction_max=1.0,
    kl_estimator="k3",
    kl_coefficient=0.0,
    kl_in="loss",
    reduction="token_mean",
    constant_length=0,
)
"""No weight at all: right on policy (Williams 1992)."""

_UNCLIPPED = dataclasses.replace(REINFORCE, is_weight_min=0.0, is_weight_max=None)


def ppo(clip: float = 0.2, *, dual_clip: float | None = None) -> PolicyGradientConfig:
    """arXiv 1707.06347 equation 7; the gradient of a clipped token is zero. Its advantages come from a value model."""
    return dataclasses.replace(_UNCLIPPED, mask_low=clip, mask_high=clip, dual_clip=dual_clip)


def grpo(clip: float = 0.2, *, kl_coefficient: float = 0.04) -> PolicyGradientConfig:
    """arXiv 2402.03300 equation 3: PPO's clip, a mean over each completion first, k3 in the loss."""
    return dataclasses.replace(ppo(clip), reduction="sequence_mean", kl_coefficient=kl_coefficient)


def dr_grpo(max_new_tokens: int, *, clip: float = 0.2) -> PolicyGradientConfig:
    """arXiv 2503.20783: every completion counts for the same number of tokens, however long it is."""
    return dataclasses.replace(ppo(clip), reduction="constant", constant_length=max_new_tokens)


def dapo(low: float = 0.2, high: float = 0.28) -> PolicyGradientConfig:
    """arXiv 2503.14476 equation 8: more room upwards, and a mean over all tokens."""
    return dataclasses.replace(_UNCLIPPED, mask_low=low, mask_high=high)


def gspo(low: float = 3e-4, high: float = 4e-4) -> PolicyGradientConfig:
    """arXiv 2507.18071 equation 5: one ratio for each completion."""
    return dataclasses.replace(_UNCLIPPED, ratio="sequence", mask_low=low, mask_high=high, reduction="sequence_mean")


def cispo(is_weight_max: float = 5.0) -> PolicyGradientConfig:
    """MiniMax-M1, arXiv 2506.13585 equations 4 and 5: no token is left out, its weight is capped.

    Args:
        is_weight_max: 1 + epsilon_high^IS, undisclosed; ScaleRL (arXiv 2510.13786) found 4 to 8 to do the same.
    """
    return dataclasses.replace(_UNCLIPPED, is_weight_max=is_weight_max)


def masked_cispo(is_weight_max: float = 5.0, *, low: float = 0.2, high: float = 0.28) -> PolicyGradientConfig:
    """The unified form of MiniMax-M1, equations 6 and 7: capped weights and a trust region."""
    return dataclasses.replace(cispo(is_weight_max), mask_low=low, mask_high=high)


def minimax_text_01(clip: float = 0.2, *, dual_clip: float = 3.0, kl_coefficient: float = 0.01) -> PolicyGradientConfig:
    """GRPO as MiniMax-01 changes it, arXiv 2501.08313 section 5.4.2: no gradient for unlikely-made-likely tokens of bad
    completions, and a divergence whose gradient is the difference of probabilities. All its numbers are undisclosed.

    Its balance of good and bad examples is in the advantages, which of one group sum to zero.
    """
    return dataclasses.replace(
        grpo(clip, kl_coefficient=kl_coefficient), dual_clip=dual_clip, kl_estimator="probability_gap"
    )
