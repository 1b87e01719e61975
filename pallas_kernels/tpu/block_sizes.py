"""How the TPU kernels cut their arrays, by generation of the chip, head dim and dtype.

The table behind it, block_size_table.py, is written by benchmarks/tpu_block_sizes.py.
"""

import math
from typing import Literal, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.block_size_table import BLOCK_SIZES

Generation = Literal["v4", "v5e", "v5p", "v6e", "tpu7x"]

HEAD_DIMS = (64, 96, 128, 256)  # of the table
LANES = 128  # of a vector register: a block of [B, T, H*K] is a multiple of it wide, unless it is all of H*K
ANY_TPU: Generation = "v5e"  # the least VMEM: what fits there fits everywhere
TWO_CORES = ("v4", "v5p")  # of one device, which share out the blocks of heads: a single row needs two of them
COST_OF_A_STEP = 2  # in heads, besides those that it computes; from the model behind the table


class BlockSizes(NamedTuple):
    """Tokens per chunk, and heads per step of the forward and of the backward kernel."""

    chunk: int
    forward_heads: int
    backward_heads: int


def generation() -> Generation | None:
    """Of this process's default device; None if it is no TPU, or one without block sizes."""
    if not pltpu.is_tpu_device():
        return None
    version = str(pltpu.get_tpu_info().chip_version).replace("7x", "tpu7x")
    return version if any(version == known for known, *_ in BLOCK_SIZES) else None


def choose_block_sizes(
    generation: Generation,
    length: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: str,
    chunk: int | None = None,
) -> BlockSizes:
    """For arrays [B, T, H, K] and [B, T, H, V]: the table's, with no more tokens and heads than there are.

    `chunk` overrides the table's; the compiler wants a multiple of 128, unless it is T or more.
    """
    head_dim = next(dim for dim in HEAD_DIMS if dim >= max(key_dim, value_dim))
    table_chunk, *most_heads = BLOCK_SIZES[generation, head_dim, dtype]
    fewest = math.lcm(*(LANES // math.gcd(LANES, dim) for dim in (key_dim, value_dim)))
    if generation in TWO_CORES:
        most_heads = [min(most, pl.cdiv(num_heads, 2)) for most in most_heads]
    return BlockSizes(min(chunk or table_chunk, length), *(_heads(num_heads, most, fewest) for most in most_heads))


def _heads(num_heads: int, most: int, fewest: int) -> int:
    """All heads if at most `most`; else the multiple of `fewest` up to `most` with which all steps cost the least."""
    if num_heads <= max(most, fewest):
        return num_heads
    return min(
        range(fewest, max(most, fewest) + 1, fewest),
        key=lambda heads: pl.cdiv(num_heads, heads) * (heads + COST_OF_A_STEP),
    )
