"""What a completion is worth: verifiers of answers, of code, of instructions and of puzzles, and models that judge."""

from lightning_jax.rewards.code import CodeReward
from lightning_jax.rewards.combining import ByDataset, WeightedSum
from lightning_jax.rewards.ifeval import IFEvalReward
from lightning_jax.rewards.math_answers import MathReward, gsm8k_reward
from lightning_jax.rewards.reward import Completion, Reward, RewardFunction
from lightning_jax.rewards.sandbox import Execution, FunctionTests, Limits, Program, Sandbox

__all__ = [
    "ByDataset",
    "CodeReward",
    "Completion",
    "Execution",
    "FunctionTests",
    "IFEvalReward",
    "Limits",
    "MathReward",
    "Program",
    "Reward",
    "RewardFunction",
    "Sandbox",
    "WeightedSum",
    "gsm8k_reward",
]
