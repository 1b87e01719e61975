"""The backward as one Pallas TPU kernel: one sweep from the last chunk to the first, dS in VMEM.

Source: Lightning Attention-2 (arXiv 2401.04658) algorithm 2.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, N chunks, C chunk length (i, j its queries and keys),
h heads of one block, A = H * K, U = H * V.
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
    return pl.pallas_call(
        partial(_kernel, grid=grid),
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
            pltpu.VMEM((heads, key_dim, value_dim), jnp.float32),
            pltpu.VMEM((heads, chunk, chunk), jnp.float32),
        ),
        compiler_params=compiler_params(),
    )(*operands)


def _kernel(
    log_decay, borders, q, k, v, states, do, d_final_state, dq, dk, dv, d_initial_state, d_state, within, *, grid
):
    step = pl.program_id(2)
    first_head = pl.program_id(1) * grid.heads
    key_dim, value_dim = d_state.shape[1:]

    @pl.when(step == 0)
    def _():
        d_state[...] = d_final_state[0]
        for h in range(grid.heads):
            within[h] = decays_within(log_decay[0, first_head + h], grid.chunk)

    chunk = Chunk(grid, grid.chunks - 1 - step, borders)
    for h in range(grid.heads):
        a = log_decay[0, first_head + h]
        key_lanes, value_lanes = pl.ds(h * key_dim, key_dim), pl.ds(h * value_dim, value_dim)
        q_CK, k_CK = chunk.rows(q[0, :, key_lanes]), chunk.rows(k[0, :, key_lanes])
        v_CV, do_CV = chunk.rows(v[0, :, value_lanes]), chunk.rows(do[0, :, value_lanes])
        dtype, state_KV, d_state_KV = q_CK.dtype, states[0, 0, h], d_state[h]
        d_state_operand_KV, to_end_C1 = d_state_KV.astype(dtype), chunk.to_end(a)
        decayed_do_CV = (chunk.from_start(a) * do_CV).astype(dtype)

        scores_CC = chunk.within(matmul(q_CK, k_CK, 1, 1), within[h]).astype(dtype)
        d_scores_CC = chunk.within(matmul(do_CV, v_CV, 1, 1), within[h]).astype(dtype)
        dq_CK = matmul(d_scores_CC, k_CK, 1, 0) + matmul(decayed_do_CV, state_KV, 1, 1)
        dk_CK = matmul(d_scores_CC, q_CK, 0, 0) + to_end_C1 * matmul(v_CV, d_state_operand_KV, 1, 1)
        dv_CV = matmul(scores_CC, do_CV, 0, 0) + to_end_C1 * matmul(k_CK, d_state_operand_KV, 1, 0)
        dq[0, :, key_lanes] = dq_CK.astype(dq.dtype)
        dk[0, :, key_lanes] = dk_CK.astype(dk.dtype)
        dv[0, :, value_lanes] = dv_CV.astype(dv.dtype)
        d_state[h] = chunk.across(a) * d_state_KV + matmul(q_CK, decayed_do_CV, 0, 0)

    @pl.when(step == grid.chunks - 1)
    def _():
        d_initial_state[0] = d_state[...]
