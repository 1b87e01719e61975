"""How a model and its batches are laid out across devices."""

from lightning_jax.parallel.config import MeshConfig
from lightning_jax.parallel.layout import operators
from lightning_jax.parallel.mesh import MeshError, make_mesh, without_sequence
from lightning_jax.parallel.sharding import (
    RULES,
    ShardingError,
    ShardingRules,
    batch_sharding,
    batch_shards,
    constrain,
    create_sharded,
    shardings,
)

__all__ = [
    "RULES",
    "MeshConfig",
    "MeshError",
    "ShardingError",
    "ShardingRules",
    "batch_sharding",
    "batch_shards",
    "constrain",
    "create_sharded",
    "make_mesh",
    "operators",
    "shardings",
    "without_sequence",
]
