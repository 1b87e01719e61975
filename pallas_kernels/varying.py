"""Arrays made inside `jax.shard_map`: a loop's carry must vary over the same mesh axes as the loop's result."""

import jax
from jax import lax


def vary_like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """x, typed as varying wherever `reference` varies; x itself outside shard_map."""
    missing = jax.typeof(reference).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x
