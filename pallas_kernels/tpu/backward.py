"""The backward as one Pallas TPU kernel: one sweep from the last chunk to the first, dS in VMEM.

Source: Lightning Attention-2 (arXiv 2401.04658) algorithm 2.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, N chunks, C chunk length (i, j its queries and keys),
h heads of one block, A = H * K, U = H * V. Behind a chunk's C, K and V are those of all heads computed together.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.chunk import (
    Borders,
    Chunk,
    Grid,
    border_specs,
    compiler_params,
    decays_within,
    matmul,
)
from pallas_kernels.tpu.lanes import block, diagonal, head_by_head, heads_together, of_one, on_diagonal, side_by_side
from pallas_kernels.varying import shape_like


def backward(
    q_BTA: jax.Array,
    k_BTA: jax.Array,
    v_BTU: jax.Array,
    log_decay_H: jax.Array,
    borders: Borders | None,
    states_BNHKV: jax.Array,
    do_BTU: jax.Array,
    d_final_state_BHKV: jax.Array,
    *,
    chunk: int,
    heads: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk, dv in the dtypes of q, k, v, and the gradient of the initial state, from the forward's states."""
    batch, length, _ = q_BTA.shape
    _, num_heads, key_dim, value_dim = d_final_state_BHKV.shape
    grid = Grid(batch, length, num_heads, heads, chunk)

    def reverse(n):
        return grid.chunks - 1 - n

    keys = pl.BlockSpec((1, chunk, heads * key_dim), lambda b, h, n: (b, reverse(n), h))
    values = pl.BlockSpec((1, chunk, heads * value_dim), lambda b, h, n: (b, reverse(n), h))
    state = pl.BlockSpec((1, heads, key_dim, value_dim), lambda b, h, n: (b, h, 0, 0))
    states = pl.BlockSpec((1, 1, heads, key_dim, value_dim), lambda b, h, n: (b, reverse(n), h, 0, 0))
    operands = (grid.per_head(log_decay_H), borders, q_BTA, k_BTA, v_BTU, states_BNHKV, do_BTU, d_final_state_BHKV)
    groups = heads_together(heads, key_dim, value_dim)
    return pl.pallas_call(
        partial(_kernel, grid=grid, groups=groups),
        name="lightning_attention_backward",
        grid=grid.steps,
        in_specs=(
            pl.BlockSpec(memory_space=pltpu.SMEM),
            border_specs(borders, grid, reverse),
            keys,
            keys,
            values,
            states,
            values,
            state,
        ),
        out_specs=(keys, keys, values, state),
        out_shape=(
            shape_like(q_BTA.shape, q_BTA.dtype, q_BTA),
            shape_like(k_BTA.shape, k_BTA.dtype, q_BTA),
            shape_like(v_BTU.shape, v_BTU.dtype, q_BTA),
            shape_like(d_final_state_BHKV.shape, jnp.float32, q_BTA),
        ),
        scratch_shapes=(
            [pltpu.VMEM((len(group) * key_dim, len(group) * value_dim), jnp.float32) for group in groups],
            pltpu.VMEM((heads, chunk, chunk), jnp.float32),
        ),
        compiler_params=compiler_params(),
    )(*operands)


def _kernel(
    log_decay,
    borders,
    q,
    k,
    v,
    states,
    do,
    d_final_state,
    dq,
    dk,
    dv,
    d_initial_state,
    d_state,
    within,
    *,
    grid,
    groups,
):
    step = pl.program_id(2)
    first_head = pl.program_id(1) * grid.heads
    key_dim, value_dim = d_final_state.shape[2:]

    @pl.when(step == 0)
    def _():
        for group, d_state_ref in zip(groups, d_state, strict=True):
            d_state_ref[...] = diagonal([d_final_state[0, h] for h in group])
        for h in range(grid.heads):
            within[h] = decays_within(log_decay[0, first_head + h], grid.chunk)

    chunk = Chunk(grid, grid.chunks - 1 - step, first_head, borders)
    for group, d_state_ref in zip(groups, d_state, strict=True):
        decays = [log_decay[0, first_head + h] for h in group]
        q_CK, k_CK, v_CV, do_CV = (chunk.load(x, group) for x in (q, k, v, do))
        dtype, d_state_KV = q_CK.dtype, d_state_ref[...]
        state_KV, d_state_operand_KV = diagonal([states[0, 0, h] for h in group]), d_state_KV.astype(dtype)
        from_start_CV = side_by_side([chunk.from_start(a) for a in decays], value_dim)
        to_end = [chunk.to_end(a) for a in decays]
        decayed_do_CV = (from_start_CV * do_CV).astype(dtype)

        scores, d_scores = (
            [
                chunk.within(matmul(of_one(x_CW, i, group), y_CW, 1, 1), within[h]).astype(dtype)
                for i, h in enumerate(group)
            ]
            for x_CW, y_CW in ((q_CK, k_CK), (do_CV, v_CV))
        )
        dq_CK = head_by_head(d_scores, k_CK, 1, group) + matmul(decayed_do_CV, state_KV, 1, 1)
        to_end_CK, to_end_CV = side_by_side(to_end, key_dim), side_by_side(to_end, value_dim)
        dk_CK = head_by_head(d_scores, q_CK, 0, group) + to_end_CK * matmul(v_CV, d_state_operand_KV, 1, 1)
        dv_CV = head_by_head(scores, do_CV, 0, group) + to_end_CV * matmul(k_CK, d_state_operand_KV, 1, 0)
        chunk.store(dq, group, dq_CK)
        chunk.store(dk, group, dk_CK)
        chunk.store(dv, group, dv_CV)
        across_1V = side_by_side([chunk.across(a) for a in decays], value_dim)
        added_KV = on_diagonal(matmul(q_CK, decayed_do_CV, 0, 0), group)
        d_state_ref[...] = across_1V * d_state_KV + added_KV

    @pl.when(step == grid.chunks - 1)
    def _():
        for group, d_state_ref in zip(groups, d_state, strict=True):
            for i, h in enumerate(group):
                d_initial_state[0, h] = block(d_state_ref[...], i, group)
