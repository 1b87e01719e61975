"""What the forward and the backward kernel share: a chunk's powers of λ, its borders between documents, its tail.

Source: Lightning Attention-2 (arXiv 2401.04658) algorithms 1 and 2, with every decay as λ to a power ≥ 0.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, N chunks, C chunk length (i, j its queries and keys),
h heads of one block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows and blocks of heads are independent; chunks follow each other, since each takes the state of the one before.
DIMENSION_SEMANTICS = ("parallel", "parallel", "arbitrary")


def compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=DIMENSION_SEMANTICS)


class Grid(NamedTuple):
    """How [B, T, H, ·] is cut: one step of the grid (B, head blocks, N) computes `chunk` tokens of `heads` heads.

    Neither need divide its axis. Heads beyond H compute on undefined numbers that are never stored; tokens beyond T
    are zeroed by `Chunk.load`.
    """

    batch: int
    length: int
    num_heads: int
    heads: int
    chunk: int

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    @property
    def steps(self) -> tuple[int, int, int]:
        return self.batch, pl.cdiv(self.num_heads, self.heads), self.chunks

    def per_head(self, x_H: jax.Array) -> jax.Array:
        """x [1, H], with entries for the heads beyond H too."""
        return jnp.pad(x_H, (0, self.steps[1] * self.heads - self.num_heads))[None]


class Borders(NamedTuple):
    """Where documents begin and end, in positions relative to the first token of each chunk.

    Of tokens j ≤ i, i sees j if j's document has not ended before i: one number per key, compared with the row's index.
    """

    last_B1T: jax.Array  # of key j: the last token of its document
    reach_BN12: jax.Array  # the last token that sees the entering state; the first that the leaving state holds


def find_borders(segment_ids_BT: jax.Array | None, chunk: int) -> Borders | None:
    """The initial state belongs to the first token's document; a document ends wherever the id changes."""
    if segment_ids_BT is None:
        return None
    length = segment_ids_BT.shape[1]
    t_T = jnp.arange(length, dtype=jnp.int32)
    changes_BS = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    begins_BT = jnp.pad(changes_BS, ((0, 0), (1, 0)), constant_values=True)
    ends_BT = jnp.pad(changes_BS, ((0, 0), (0, 1)), constant_values=True)
    first_BT = lax.cummax(jnp.where(begins_BT, t_T, 0), axis=1)
    last_BT = lax.cummin(jnp.where(ends_BT, t_T, length - 1), axis=1, reverse=True)
    start_N = jnp.arange(0, length, chunk, dtype=jnp.int32)
    entering_BN = last_BT[:, jnp.maximum(start_N - 1, 0)] - start_N
    leaving_BN = first_BT[:, jnp.minimum(start_N + chunk, length) - 1] - start_N
    return Borders((last_BT - t_T // chunk * chunk)[:, None], jnp.stack([entering_BN, leaving_BN], axis=-1)[:, :, None])


def border_specs(borders: Borders | None, grid: Grid, chunk_index) -> Borders | None:
    """Block specs of `borders`; `chunk_index` maps the grid's last index to a chunk."""
    if borders is None:
        return None
    return Borders(
        pl.BlockSpec((1, 1, grid.chunk), lambda b, h, n: (b, 0, chunk_index(n))),
        pl.BlockSpec((1, 1, 1, 2), lambda b, h, n: (b, chunk_index(n), 0, 0), memory_space=pltpu.SMEM),
    )


def decays_within(log_decay: jax.Array, chunk: int) -> jax.Array:
    """M [C, C]: λ^(i-j) for j ≤ i, else 0."""
    distance_CC = _iota((chunk, chunk), 0) - _iota((chunk, chunk), 1)
    return jnp.where(distance_CC >= 0, _power(log_decay, distance_CC), 0)


class Chunk:
    """One chunk inside a kernel: which of its tokens exist and see each other, for all heads of the block."""

    def __init__(self, grid: Grid, index: jax.Array, first_head: jax.Array, borders: Borders | None):
        self.grid, self.first_head, self.size = grid, first_head, grid.chunk
        has_tail = grid.length % grid.chunk != 0
        self.valid = jnp.minimum(grid.chunk, grid.length - index * grid.chunk) if has_tail else None
        self.i_C1 = _iota((grid.chunk, 1), 0)
        self.borders = borders
        if borders is not None:
            self.entering, self.leaving = borders.reach_BN12[0, 0, 0, 0], borders.reach_BN12[0, 0, 0, 1]
            self.sees_CC = _iota((grid.chunk, grid.chunk), 0) <= borders.last_B1T[0]

    def load(self, x: jax.Ref, heads: range) -> jax.Array:
        """[C, lanes of these heads]: zero where the block holds undefined numbers that would reach others.

        Those are tokens behind the sequence's end, and the neighbour of the last head.
        """
        x_CW = x[0, :, self._lanes(x, heads)]
        if self.valid is not None:
            x_CW = jnp.where(self.i_C1 < self.valid, x_CW, jnp.zeros_like(x_CW))
        if len(heads) > 1 and self.grid.num_heads % self.grid.heads % 2:
            dim = x.shape[-1] // self.grid.heads
            exist = _iota((1, x_CW.shape[1]), 1) < (self.grid.num_heads - self.first_head - heads.start) * dim
            x_CW = jnp.where(exist, x_CW, jnp.zeros_like(x_CW))
        return x_CW

    def store(self, x: jax.Ref, heads: range, x_CW: jax.Array) -> None:
        x[0, :, self._lanes(x, heads)] = x_CW.astype(x.dtype)

    def _lanes(self, x, heads):
        dim = x.shape[-1] // self.grid.heads
        return pl.ds(heads.start * dim, len(heads) * dim)

    def within(self, scores_CC: jax.Array, decays_CC: jax.Array) -> jax.Array:
        """scores ⊙ M, without pairs of different documents."""
        products_CC = scores_CC * decays_CC
        return products_CC if self.borders is None else jnp.where(self.sees_CC, products_CC, 0)

    def from_start(self, log_decay: jax.Array) -> jax.Array:
        """[C, 1]: λ^(i+1), the weight of the entering state for query i."""
        decay_C1 = _power(log_decay, self.i_C1 + 1)
        return decay_C1 if self.borders is None else jnp.where(self.i_C1 <= self.entering, decay_C1, 0)

    def to_end(self, log_decay: jax.Array) -> jax.Array:
        """[C, 1]: λ^(C-1-j), the weight of key j in the leaving state."""
        decay_C1 = _power(log_decay, self._length - 1 - self.i_C1)
        return decay_C1 if self.borders is None else jnp.where(self.i_C1 >= self.leaving, decay_C1, 0)

    def across(self, log_decay: jax.Array) -> jax.Array:
        """[1, 1]: λ^C, the weight of the entering state in the leaving state."""
        decay_11 = _power(log_decay, jnp.full((1, 1), self._length, jnp.int32))
        return decay_11 if self.borders is None else jnp.where(self.entering >= self._length - 1, decay_11, 0)

    @property
    def _length(self) -> jax.Array | int:
        return self.size if self.valid is None else self.valid


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _power(log_decay: jax.Array, distance: jax.Array) -> jax.Array:
    # Clipped, since pairs and tokens that are masked afterwards must not overflow before.
    return jnp.exp(log_decay * jnp.maximum(distance, 0).astype(jnp.float32))


def matmul(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Contracts one axis of each; operands as they are, sums in fp32.

    The default of a matrix unit for fp32 operands is one bf16 pass, hence HIGHEST; bf16 operands have only one speed.
    """
    precision = lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)
