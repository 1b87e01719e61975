"""Fingerprints of arrays: two 32-bit sums over the bit pattern of every element, mixed with its position.

Wrap-around integer sums do not depend on the order of addition, so an array has one fingerprint on any number of
devices and under any sharding, and it is computed where the array lives. The mixing is a bijection of an element's
bits: one damaged element always shows; moved or several damaged ones escape with probability 2^-64. It finds faults,
not forgery.

Source: the mixing is the finaliser of MurmurHash3 (A. Appleby, public domain).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

_SEEDS = (0x9E3779B9, 0x3C6EF372)  # any two will do: the fraction of the golden ratio, and twice it


def fingerprints(arrays: Mapping[str, jax.Array]) -> Callable[[], dict[str, str]]:
    """Starts computing the fingerprint of every array; the result waits for them: 16 hexadecimal digits each.

    The arrays may be donated as soon as this returns. Every process must call it with its part of the same arrays.
    """
    # One call per array: those of one shape and sharding, as parameters and their moments, share a compiled function.
    pending = {path: _started(array) for path, array in arrays.items()}

    def finish() -> dict[str, str]:
        return {path: written(sums) for path, sums in jax.device_get(pending).items()}

    return finish


def _started(array: jax.Array) -> jax.Array:
    if array.sharding.memory_kind != "pinned_host":
        return _fingerprint(array)
    # Arrays in the host's memory come to the devices one by one, which may not hold them together.
    there = jax.device_put(array, array.sharding.with_memory_kind("device"))
    return jax.block_until_ready(_fingerprint(there))


def block_sums(block: np.ndarray, start: tuple[int, ...]) -> np.ndarray:
    """What a block of an array, beginning at index `start`, adds to the array's two sums; uint32 [2]."""
    return np.asarray(_fingerprint(block, np.array(start, np.uint32)))


def written(sums: np.ndarray) -> str:
    """The fingerprint whose two sums these are."""
    return f"{sums[0]:08x}{sums[1]:08x}"


@jax.jit
def _fingerprint(array: jax.Array, start: jax.Array | None = None) -> jax.Array:
    return jnp.stack([_position_mixed_sum(_bits(array), seed, start) for seed in _SEEDS])


def _bits(array: jax.Array) -> jax.Array:
    """The elements' bit patterns as uint32, with a trailing dimension where an element has more than 32 bits."""
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = min(jax.dtypes.itemsize_bits(array.dtype), 32)
    return jax.lax.bitcast_convert_type(array, f"uint{bits}").astype(jnp.uint32)


def _position_mixed_sum(bits: jax.Array, seed: int, start: jax.Array | None) -> jax.Array:
    position = jnp.uint32(seed)
    for axis in range(bits.ndim):
        # An odd factor per axis: no two rows of an axis of fewer than 2^32 share a position.
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + (0 if start is None else start[axis])
        position += index * (_mix(jnp.uint32(seed + axis)) | 1)
    return jnp.sum(_mix(bits ^ position), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
