"""What a completion is worth: verifiers of answers, of code, of instructions and of puzzles, and models that judge."""

from lightning_jax.rewards.combining import ByDataset, WeightedSum
from lightning_jax.rewards.reward import Completion, Reward, RewardFunction

__all__ = ["ByDataset", "Completion", "Reward", "RewardFunction", "WeightedSum"]
