"""Heads side by side in a register: two that fit in its lanes are computed as one, with a block-diagonal state.

A head of 64 dims alone would leave half of the lanes and of the matrix unit empty. With S block-diagonal, Q S is of
both heads at once; Q Kᵀ of one of them is Q, zero in the other's lanes, times Kᵀ of both.
Shapes: C chunk length, K key dim, V value dim, W lanes of the heads together, D of one of them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.block_sizes import LANES
from pallas_kernels.tpu.chunk import matmul


def heads_together(heads: int, key_dim: int, value_dim: int) -> list[range]:
    """The heads of a block, two by two if two fit in a register; a last one without a neighbour is alone."""
    most = 2 if 2 * max(key_dim, value_dim) <= LANES else 1
    return [range(first, min(first + most, heads)) for first in range(0, heads, most)]


def side_by_side(numbers: Sequence[jax.Array], dim: int) -> jax.Array:
    """[·, W]: of each head [·, 1], in its D lanes; of a head alone as it is."""
    if len(numbers) == 1:
        return numbers[0]
    return jnp.where(lax.broadcasted_iota(jnp.int32, (1, 2 * dim), 1) < dim, *numbers)


def of_one(x_CW: jax.Array, n: int, heads: range) -> jax.Array:
    """x, zero outside the lanes of the n-th of the heads."""
    return x_CW if len(heads) == 1 else jnp.where(_of_second(x_CW, 1) == bool(n), x_CW, jnp.zeros_like(x_CW))


def head_by_head(weights: Sequence[jax.Array], x_CW: jax.Array, axis: int, heads: range) -> jax.Array:
    """[C, W]: each head's weights [C, C] times its lanes of x, contracting this axis of the weights."""
    products = [matmul(weights_CC, of_one(x_CW, n, heads), axis, 0) for n, weights_CC in enumerate(weights)]
    return products[0] if len(heads) == 1 else products[0] + products[1]


def diagonal(blocks: Sequence[jax.Array]) -> jax.Array:
    """The heads' [K, V] on the diagonal of one matrix, zeros elsewhere."""
    if len(blocks) == 1:
        return blocks[0]
    first, second = blocks
    zeros = jnp.zeros_like(first)
    return jnp.concatenate([jnp.concatenate([first, zeros], 1), jnp.concatenate([zeros, second], 1)], 0)


def on_diagonal(x_WW: jax.Array, heads: range) -> jax.Array:
    """x, zero where row and lane are of different heads."""
    return x_WW if len(heads) == 1 else jnp.where(_of_second(x_WW, 0) == _of_second(x_WW, 1), x_WW, 0)


def block(x_WW: jax.Array, n: int, heads: range) -> jax.Array:
    """[K, V] of the n-th of the heads in a block-diagonal matrix."""
    K, V = (side // len(heads) for side in x_WW.shape)
    return x_WW[n * K : (n + 1) * K, n * V : (n + 1) * V]


def _of_second(x: jax.Array, axis: int) -> jax.Array:
    """Whether each number of x belongs to the second of two heads."""
    return lax.broadcasted_iota(jnp.int32, x.shape, axis) >= x.shape[axis] // 2
