"""Which GPUs and heads the Hopper kernels are for, and how a call's work is shared out over the multiprocessors.

Needs no Mosaic GPU, so that a machine without it can say so.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, N chunks, P pieces of the sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64  # tokens of a chunk: the rows of one matmul instruction
TILE_ROWS = 8  # tokens that the copy engine moves as one
BLOCK = 64  # columns of V that one warpgroup computes: bf16 in the 128 bytes of a swizzled row
HEAD_DIMS = (64, 96, 128, 256)
MULTIPROCESSORS = 132  # of an H100 SXM, H200 or GH200
SHARED_MEMORY = 227 * 1024  # bytes that one thread block may have
OLDEST_JAX = (0, 11)


class Plan(NamedTuple):
    """How the heads of all rows become thread blocks: B * H * blocks of columns * pieces of the sequence."""

    length: int  # T
    warpgroups: int  # that compute in one thread block, each with BLOCK columns of V
    pieces: int  # of the sequence, swept at the same time


def obstacle(key_dim: int, value_dim: int, dtype: jnp.dtype) -> str | None:
    """Why the kernels are not for this process's GPU and these inputs; None if they are."""
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"the GPU kernel needs jax {'.'.join(map(str, OLDEST_JAX))} or newer, this is {jax.__version__}"
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        return f"the GPU kernel is for Hopper GPUs, not {device.device_kind}"
    return obstacle_of_inputs(key_dim, value_dim, dtype)


def obstacle_of_inputs(key_dim: int, value_dim: int, dtype: jnp.dtype) -> str | None:
    """Why the kernels are not for these inputs on any GPU; None if they are."""
    if key_dim != value_dim or key_dim not in HEAD_DIMS:
        return f"the GPU kernel has head dims {', '.join(map(str, HEAD_DIMS))}, not {key_dim} and {value_dim}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"the GPU kernel takes bfloat16, not {jnp.dtype(dtype).name}"
    return None


def choose_plan(batch: int, length: int, heads: int, head_dim: int) -> Plan:
    """Of the plans that leave no multiprocessor idle, the one that reads the least.

    All columns of V in one thread block read q and k once; each further block of the same head reads them again, mostly
    from the L2 cache. Pieces of the sequence read k and v twice, once for the states that enter them.
    """
    rows = batch * heads
    column_blocks = -(-head_dim // BLOCK)
    # Four warpgroups of a head with 256 dims would exceed shared memory.
    warpgroups = column_blocks if column_blocks <= 2 and rows >= MULTIPROCESSORS else 1
    blocks = rows * column_blocks // warpgroups
    chunks = -(-length // CHUNK)
    # A piece shorter than 8 chunks would spend its time on loading and storing states.
    pieces = max(1, min(MULTIPROCESSORS // blocks, chunks // 8))
    chunks_of_piece = -(-chunks // pieces)
    return Plan(length, warpgroups, -(-chunks // chunks_of_piece))
