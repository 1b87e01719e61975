"""Optimizers (optax), learning-rate schedules and batch sizes: each a plain function of the step."""

from lightning_jax.optimizers.adamw import build_optimizer
from lightning_jax.optimizers.batch_size import BatchSizes
from lightning_jax.optimizers.config import BatchSizeConfig, OptimizerConfig, ScheduleConfig
from lightning_jax.optimizers.finite import is_finite, where_finite
from lightning_jax.optimizers.schedules import LearningRate, learning_rate

__all__ = [
    "BatchSizeConfig",
    "BatchSizes",
    "LearningRate",
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
    "is_finite",
    "learning_rate",
    "where_finite",
]
