"""How a training state lies in a checkpoint: a flat dictionary from the path of each leaf to its array.

`{"params": {"layers": [w]}, "optimizer": AdamState(count, mu)}` is stored as `params/layers/0`, `optimizer/count` and
`optimizer/mu`. No container class is written, so a state is restored into whatever tree has the same paths, and any
tool that reads Orbax checkpoints sees the same names. PRNG keys are stored as their key data; arrays of size zero are
in the manifest only.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lightning_jax.checkpoints.manifest import CheckpointError


def named_leaves(state: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths, e.g. `optimizer/0/mu/embedding`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise CheckpointError("two leaves of the state have the same path; a key may not contain '/'")
    for path, leaf in named.items():
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise CheckpointError(f"state leaf {path} is a {type(leaf).__name__}; every leaf must be a jax.Array")
    return named


def rebuild(abstract_state: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """The tree of `abstract_state` with the arrays of the same paths."""
    leaves = [arrays[path] for path in named_leaves(abstract_state)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored_arrays(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What is written to disk for these leaves."""
    return {path: jax.random.key_data(leaf) if is_key(leaf) else leaf for path, leaf in leaves.items() if leaf.size}


def stored_shapes(abstract_leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """`stored_arrays` for abstract leaves; each gets a sharding, the default device where it names none."""
    return {path: _stored_shape(leaf) for path, leaf in abstract_leaves.items() if leaf.size}


def restored_leaves(
    abstract_leaves: Mapping[str, jax.ShapeDtypeStruct], stored: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The inverse of `stored_arrays`."""
    return {path: _restored_leaf(leaf, stored.get(path)) for path, leaf in abstract_leaves.items()}


def _stored_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _restored_leaf(leaf: jax.ShapeDtypeStruct, stored: jax.Array | None) -> jax.Array:
    if stored is None:
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    if is_key(leaf):
        return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(jnp.empty((), leaf.dtype)))
    return stored
