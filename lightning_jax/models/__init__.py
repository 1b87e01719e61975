"""What the network computes; knows nothing of devices, optimizers or data."""

from lightning_jax.models.config import ModelConfig, RopeScaling
from lightning_jax.models.hybrid import HybridLM
from lightning_jax.models.moe import RouterSums
from lightning_jax.models.operators import Operators
from lightning_jax.models.reward_model import RewardModel

__all__ = ["HybridLM", "ModelConfig", "Operators", "RewardModel", "RopeScaling", "RouterSums"]
