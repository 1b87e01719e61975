"""What is minimised: functions of sums over tokens or pairs, so that no result depends on how a batch is split."""

from lightning_jax.objectives.config import (
    AdvantageConfig,
    PolicyGradientConfig,
    PreferenceConfig,
    RewardModelConfig,
)
from lightning_jax.objectives.next_token import NextToken, NextTokenSums
from lightning_jax.objectives.pair_sums import PairSums
from lightning_jax.objectives.policy_gradient import PolicyGradient, PolicyGradientSums
from lightning_jax.objectives.preference import Preference
from lightning_jax.objectives.reward import Reward

__all__ = [
    "AdvantageConfig",
    "NextToken",
    "NextTokenSums",
    "PairSums",
    "PolicyGradient",
    "PolicyGradientConfig",
    "PolicyGradientSums",
    "Preference",
    "PreferenceConfig",
    "Reward",
    "RewardModelConfig",
]
