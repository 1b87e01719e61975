"""How a model and its batches are laid out across devices."""

from lightning_jax.parallel.config import MeshConfig
from lightning_jax.parallel.layout import operators
from lightning_jax.parallel.mesh import MeshError, make_mesh, without_sequence
from lightning_jax.parallel.sharding import (
    RULES,
    RowsOfHost,
    ShardingError,
    ShardingRules,
    abstract,
    batch_sharding,
    batch_shards,
    constrain,
    on_host,
    rows_of_host,
    shardings,
)

__all__ = [
    "RULES",
    "MeshConfig",
    "MeshError",
    "RowsOfHost",
    "ShardingError",
    "ShardingRules",
    "abstract",
    "batch_sharding",
    "batch_shards",
    "constrain",
    "make_mesh",
    "on_host",
    "operators",
    "rows_of_host",
    "shardings",
    "without_sequence",
]
