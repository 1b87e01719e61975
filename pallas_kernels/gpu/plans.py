"""Which GPUs and heads the Hopper kernels are for, and how a call's work is shared out over the multiprocessors.

Needs no Mosaic GPU, so that a machine without it can say so.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, N chunks, P pieces of the sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

CHUNK = 64  # tokens of a chunk: the rows of one matmul instruction
WARPGROUPS = 2  # of a thread block that compute, so that one uses the matmul unit while the other does not
TILE_ROWS = 8  # tokens that the copy engine moves as one
HEAD_DIMS = (64, 96, 128, 256)
MULTIPROCESSORS = 132  # of an H100 SXM, H200 or GH200
SHARED_MEMORY = 227 * 1024  # bytes that one thread block may have
OLDEST_JAX = (0, 11)


class Plan(NamedTuple):
    """How the heads of all rows become thread blocks of one sweep: B * H * P times the blocks of V's columns."""

    length: int  # T
    columns: int  # of V that one warpgroup computes: 32 or 64, as wide as a tile in shared memory
    pieces: int  # of the sequence, swept at the same time


class Plans(NamedTuple):
    forward: Plan  # of o, of dq, and where there is no other of dk and of dv
    reverse: Plan | None  # of dk and dv in one sweep


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


def choose_plans(batch: int, length: int, heads: int, head_dim: int) -> Plans:
    """Of the plans that leave few multiprocessors idle, those that read the least.

    All columns of V in one thread block read q and k once; each further block of the same head reads them again, mostly
    from the L2 cache. Pieces of the sequence read k and v twice, once for the states that enter them. The sweep of dk
    and dv has all columns of a head in one thread block, since dk sums over them.
    """
    rows, chunks = batch * heads, pl.cdiv(length, CHUNK)
    # A head of 64 dims has no more columns, one of 256 would need more registers and shared memory.
    most_columns = 64 if head_dim in (96, 128) else 32
    columns = most_columns if rows >= MULTIPROCESSORS else 32
    forward = Plan(length, columns, _pieces(rows * pl.cdiv(head_dim, WARPGROUPS * columns), chunks))
    if head_dim > WARPGROUPS * most_columns:
        return Plans(forward, None)
    return Plans(forward, Plan(length, most_columns, _pieces(rows, chunks)))


def _pieces(blocks: int, chunks: int) -> int:
    """So many that they fill the multiprocessors left idle by `blocks` of the whole sequence."""
    # A piece shorter than 8 chunks would spend its time on loading and storing states.
    pieces = max(1, min(MULTIPROCESSORS // blocks, chunks // 8))
    return pl.cdiv(chunks, pl.cdiv(chunks, pieces))
