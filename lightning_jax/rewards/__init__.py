"""What a completion is worth: verifiers of answers, of code, of instructions and of puzzles, and models that judge."""

from lightning_jax.rewards.code import CodeReward
from lightning_jax.rewards.combining import ByDataset, Rescaled, WeightedSum
from lightning_jax.rewards.form import FormatReward
from lightning_jax.rewards.ifeval import IFEvalReward
from lightning_jax.rewards.judge import Endpoint, Judge, JudgeError, compared, graded
from lightning_jax.rewards.length_bias import LengthBias, padding_gain
from lightning_jax.rewards.math_answers import MathReward, gsm8k_reward
from lightning_jax.rewards.own import OwnReward
from lightning_jax.rewards.puzzles import make_puzzle, puzzle_records, puzzle_reward
from lightning_jax.rewards.reward import Completion, Reward, RewardFunction
from lightning_jax.rewards.reward_model import RewardModelReward
from lightning_jax.rewards.sandbox import Execution, FunctionTests, Limits, Program, Sandbox
from lightning_jax.rewards.tulu3_ifeval import Tulu3IFEvalReward

__all__ = [
    "ByDataset",
    "CodeReward",
    "Completion",
    "Endpoint",
    "Execution",
    "FormatReward",
    "FunctionTests",
    "IFEvalReward",
    "Judge",
    "JudgeError",
    "LengthBias",
    "Limits",
    "MathReward",
    "OwnReward",
    "Program",
    "Rescaled",
    "Reward",
    "RewardFunction",
    "RewardModelReward",
    "Sandbox",
    "Tulu3IFEvalReward",
    "WeightedSum",
    "compared",
    "graded",
    "gsm8k_reward",
    "make_puzzle",
    "padding_gain",
    "puzzle_records",
    "puzzle_reward",
]
