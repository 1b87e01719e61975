"""The forward as one Pallas TPU kernel: one sweep over the chunks, the state in VMEM.

Source: Lightning Attention-2 (arXiv 2401.04658) algorithm 1.
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


def forward(
    q_BTA: jax.Array,
    k_BTA: jax.Array,
    v_BTU: jax.Array,
    log_decay_H: jax.Array,
    borders: Borders | None,
    initial_state_BHKV: jax.Array,
    *,
    chunk: int,
    heads: int,
    save_states: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns o [B, T, H*V], the final state, and the state before every chunk [B, N, H, K, V] in q's dtype or None.

    A head is a slice of lanes, so the projections' outputs are read as they are, without a transpose.
    """
    batch, length, _ = q_BTA.shape
    _, num_heads, key_dim, value_dim = initial_state_BHKV.shape
    grid = Grid(batch, length, num_heads, heads, chunk)
    keys = pl.BlockSpec((1, chunk, heads * key_dim), lambda b, h, n: (b, n, h))
    values = pl.BlockSpec((1, chunk, heads * value_dim), lambda b, h, n: (b, n, h))
    state = pl.BlockSpec((1, heads, key_dim, value_dim), lambda b, h, n: (b, h, 0, 0))
    states = pl.BlockSpec((1, 1, heads, key_dim, value_dim), lambda b, h, n: (b, n, h, 0, 0))
    states_shape = (batch, grid.chunks, num_heads, key_dim, value_dim)
    operands = (grid.per_head(log_decay_H), borders, q_BTA, k_BTA, v_BTU, initial_state_BHKV)
    groups = heads_together(heads, key_dim, value_dim)
    return pl.pallas_call(
        partial(_kernel, grid=grid, groups=groups),
        name="lightning_attention_forward",
        grid=grid.steps,
        in_specs=(
            pl.BlockSpec(memory_space=pltpu.SMEM),
            border_specs(borders, grid, lambda n: n),
            keys,
            keys,
            values,
            state,
        ),
        out_specs=(values, state, states if save_states else None),
        out_shape=(
            shape_like(v_BTU.shape, v_BTU.dtype, q_BTA),
            shape_like(initial_state_BHKV.shape, jnp.float32, q_BTA),
            shape_like(states_shape, q_BTA.dtype, q_BTA) if save_states else None,
        ),
        scratch_shapes=(
            [pltpu.VMEM((len(group) * key_dim, len(group) * value_dim), jnp.float32) for group in groups],
            pltpu.VMEM((heads, chunk, chunk), jnp.float32),
        ),
        compiler_params=compiler_params(),
    )(*operands)


def _kernel(log_decay, borders, q, k, v, initial_state, o, final_state, states, state, within, *, grid, groups):
    n = pl.program_id(2)
    first_head = pl.program_id(1) * grid.heads
    key_dim, value_dim = initial_state.shape[2:]

    @pl.when(n == 0)
    def _():
        for group, state_KV in zip(groups, state, strict=True):
            state_KV[...] = diagonal([initial_state[0, h] for h in group])
        for h in range(grid.heads):
            within[h] = decays_within(log_decay[0, first_head + h], grid.chunk)

    chunk = Chunk(grid, n, first_head, borders)
    for group, state_ref in zip(groups, state, strict=True):
        decays = [log_decay[0, first_head + h] for h in group]
        q_CK, k_CK, v_CV = chunk.load(q, group), chunk.load(k, group), chunk.load(v, group)
        state_KV, dtype = state_ref[...], q_CK.dtype
        state_operand_KV = state_KV.astype(dtype)
        if states is not None:
            for i, h in enumerate(group):
                states[0, 0, h] = block(state_operand_KV, i, group)
        scores = [
            chunk.within(matmul(of_one(q_CK, i, group), k_CK, 1, 1), within[h]).astype(dtype)
            for i, h in enumerate(group)
        ]
        from_start_CV = side_by_side([chunk.from_start(a) for a in decays], value_dim)
        o_CV = head_by_head(scores, v_CV, 1, group) + from_start_CV * matmul(q_CK, state_operand_KV, 1, 0)
        chunk.store(o, group, o_CV)
        decayed_k_CK = (side_by_side([chunk.to_end(a) for a in decays], key_dim) * k_CK).astype(dtype)
        across_1V = side_by_side([chunk.across(a) for a in decays], value_dim)
        state_ref[...] = across_1V * state_KV + on_diagonal(matmul(decayed_k_CK, v_CV, 0, 0), group)

    @pl.when(n == grid.chunks - 1)
    def _():
        for group, state_ref in zip(groups, state, strict=True):
            for i, h in enumerate(group):
                final_state[0, h] = block(state_ref[...], i, group)
