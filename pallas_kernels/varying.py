"""Arrays made inside `jax.shard_map`: over which mesh axes they vary, where JAX cannot infer it.

A loop's carry must vary over the same axes as the loop's result, and a kernel's result must say what it varies over.
"""

import jax
import jax.numpy as jnp
from jax import lax


def vary_like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """x, typed as varying wherever `reference` varies; x itself outside shard_map."""
    return _vary(x, jax.typeof(reference).manual_axis_type.varying)


def vary_alike(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """The arrays, each typed as varying wherever one of them varies; None stays None."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))
    return tuple(None if x is None else _vary(x, axes) for x in arrays)


def shape_like(shape: tuple[int, ...], dtype: jnp.dtype, reference: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that varies wherever `reference`, one of its operands, varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(reference).manual_axis_type)


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x
