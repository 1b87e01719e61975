"""What the GPU kernels share: shared memory as matmuls read it, a chunk's powers of λ, borders between documents.

Source: Lightning Attention-2 (arXiv 2401.04658) algorithms 1 and 2, with every decay as λ to a power ≥ 0.
Shapes: B batch, T sequence, C chunk length (i its rows, j its columns), S tokens of whole chunks.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.plans import CHUNK, SHARED_MEMORY, Plan

# Axes of the grid, and of the warpgroups in a thread block; meshes around the kernels have other names.
HEAD, PIECE, COLUMNS, WARPGROUP = "kernel_head", "kernel_piece", "kernel_columns", "kernel_warpgroup"
MOST_STAGES = 4  # chunks in shared memory: the one that is computed, and those that are loaded meanwhile

MATRIX = plgpu.Layout.WGMMA  # how a warpgroup holds a matrix in registers
ROWS = MATRIX.reduce(1)  # and one number per row of it


def tiles(*shape: int, width: int):
    """bf16 matrices in shared memory, in tiles of 8 rows by `width` columns that matmuls and the copy engine share."""
    return plgpu.SMEM(
        shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
    )


def most_stages(stage_bytes: int, kept_bytes: int) -> int:
    """How many chunks fit into shared memory, beside what is there once."""
    return min(MOST_STAGES, (SHARED_MEMORY - kept_bytes) // stage_bytes)


def matmuls(*operands: tuple[jax.Ref, jax.Ref]) -> tuple[jax.Array, ...]:
    """The products of pairs of matrices in shared memory, summed in fp32; all are in flight at the same time."""

    def run(*sums):
        for total, (x, y) in zip(sums, operands, strict=True):
            plgpu.wgmma(total, x, y)
        return tuple(total[...] for total in sums)

    return pl.run_scoped(run, *(plgpu.ACC((x.shape[0], y.shape[1])) for x, y in operands))


def transpose(matrix: jax.Ref) -> jax.Ref:
    return matrix.transpose((1, 0))


def across_columns(x_C: jax.Array, columns: int) -> jax.Array:
    """x [C, columns], the same in each column."""
    return lax.broadcast_in_dim(x_C, (x_C.shape[0], columns), [0])


def find_borders(segment_ids_BT: jax.Array | None) -> jax.Array | None:
    """[B, 2, S]: the first and the last token of each token's document, counted along the row; None without documents.

    A document ends wherever the id changes. The first one begins at -1, since the initial state belongs to it.
    """
    if segment_ids_BT is None:
        return None
    length = segment_ids_BT.shape[1]
    t_T = jnp.arange(length, dtype=jnp.int32)
    changes_BS = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    begins_BT = jnp.pad(changes_BS, ((0, 0), (1, 0)))
    ends_BT = jnp.pad(changes_BS, ((0, 0), (0, 1)), constant_values=True)
    first_BT = lax.cummax(jnp.where(begins_BT, t_T, -1), axis=1)
    last_BT = lax.cummin(jnp.where(ends_BT, t_T, length - 1), axis=1, reverse=True)
    # Whole chunks, since the copy engine wants rows of a multiple of 16 bytes.
    return jnp.pad(jnp.stack([first_BT, last_BT], axis=1), ((0, 0), (0, 0), (0, -length % CHUNK)))


def power(log_decay: jax.Array, distance: jax.Array) -> jax.Array:
    # Clipped, since pairs and tokens that are masked afterwards must not overflow before.
    return jnp.exp(log_decay * jnp.maximum(distance, 0).astype(jnp.float32))


class Piece:
    """A piece of the sequence inside a kernel: its chunks, in the order in which the sweep comes to them."""

    def __init__(self, plan: Plan, index: jax.Array, *, reverse: bool):
        chunks = pl.cdiv(plan.length, CHUNK)
        most = pl.cdiv(chunks, plan.pieces)
        self.reverse, self.first_chunk = reverse, index * most
        self.steps = jnp.minimum(most, chunks - self.first_chunk)

    def start(self, step: jax.Array) -> jax.Array:
        """The first token of the chunk of a step."""
        return (self.first_chunk + (self.steps - 1 - step if self.reverse else step)) * CHUNK


class Chunk:
    """One chunk inside a kernel: which of its tokens exist and see each other, in the direction of the sweep.

    A warpgroup has few registers, so each method computes what it returns at the point where it is called.
    """

    def __init__(
        self, log_decay: jax.Array, start: jax.Array, length: int, borders_2C: jax.Ref | None, *, reverse: bool
    ):
        """Its first token is `start` of a sequence of `length` tokens; `borders_2C` are its columns of the borders."""
        self.log_decay, self.start, self.borders_2C, self.reverse = log_decay, start, borders_2C, reverse
        self.size = jnp.minimum(CHUNK, length - start)

    def within(self, scores_CC: jax.Array, decays_CC: jax.Array) -> jax.Array:
        """scores ⊙ M, without pairs of different documents."""
        products_CC = scores_CC * decays_CC
        if self.borders_2C is None:
            return products_CC
        j_CC = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=MATRIX)
        end_C = plgpu.load(self.borders_2C.at[int(self.reverse)], layout=ROWS) - self.start
        end_CC = across_columns(end_C, CHUNK)
        return jnp.where(j_CC <= end_CC if self.reverse else j_CC >= end_CC, products_CC, 0.0)

    def entering(self) -> jax.Array:
        """[C]: the weight of the entering state for token i."""
        return self._to_end() if self.reverse else self._from_start()

    def leaving(self) -> jax.Array:
        """[C]: the weight of token j in the leaving state."""
        return self._from_start() if self.reverse else self._to_end()

    def across(self) -> jax.Array:
        """The weight of the entering state in the leaving state: λ^C."""
        decay = power(self.log_decay, self.size)
        if self.borders_2C is None:
            return decay
        return jnp.where(self.borders_2C[0, self.size - 1] < self.start, decay, 0.0)

    def _from_start(self) -> jax.Array:
        """[C]: λ^(i+1), for the tokens of the document that the chunk begins in."""
        decay_C = power(self.log_decay, _iota_C() + 1)
        if self.borders_2C is None:
            return decay_C
        return jnp.where(plgpu.load(self.borders_2C.at[0], layout=ROWS) < self.start, decay_C, 0.0)

    def _to_end(self) -> jax.Array:
        """[C]: λ^(C-1-j), for the tokens of the document that the chunk ends in."""
        decay_C = power(self.log_decay, self.size - 1 - _iota_C())
        if self.borders_2C is None:
            return decay_C
        end = self.start + self.size - 1
        return jnp.where(plgpu.load(self.borders_2C.at[1], layout=ROWS) >= end, decay_C, 0.0)


def decays_within(log_decay: jax.Array, *, reverse: bool) -> jax.Array:
    """M [C, C]: λ^|i-j| for j ≤ i, in reverse for j ≥ i, else 0."""
    i_CC = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0, layout=MATRIX)
    j_CC = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=MATRIX)
    distance_CC = j_CC - i_CC if reverse else i_CC - j_CC
    return jnp.where(distance_CC >= 0, power(log_decay, distance_CC), 0.0)


def _iota_C() -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=ROWS)
