"""One sweep over the chunks as a Mosaic GPU kernel: the forward, and with other operands each gradient.

Source: Lightning Attention-2 (arXiv 2401.04658) algorithms 1 and 2.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, C chunk length (i its rows, j its columns), P pieces of
the sequence, S tokens of whole chunks, W columns of V of one warpgroup.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.chunk import (
    COLUMNS,
    HEAD,
    MATRIX,
    PIECE,
    WARPGROUP,
    Chunk,
    Piece,
    across_columns,
    decays_within,
    matmuls,
    most_stages,
    tiles,
    transpose,
)
from pallas_kernels.gpu.plans import CHUNK, WARPGROUPS, Plan
from pallas_kernels.varying import vary_like


def sweep(
    q_BTHK: jax.Array | None,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    borders_B2S: jax.Array | None,
    entering_BPHKV: jax.Array | None,
    *,
    plan: Plan,
    reverse: bool = False,
) -> tuple[jax.Array | None, jax.Array]:
    """Returns o [B, T, H, V] and the state behind every piece of the sequence [B, P, H, K, V] in fp32.

    T is the plan's length, or more with zeros behind it. Without q there is no o, only the states. The entering states
    are those before each piece, None for zeros.

    In reverse the sweep goes from the last token to the first; a piece's entering state is the one behind its last
    token. It weighs λ^(C-1-i) for token i of a chunk, and token j weighs λ^(j+1) in the leaving state, as dS does in
    algorithm 2, so that both directions only multiply.
    """
    batch, _, heads, key_dim = k_BTHK.shape
    value_dim = v_BTHV.shape[-1]
    # The copy engine fills what lies beyond a head's last column with zeros, and drops it when it stores.
    key_columns, value_columns = (pl.cdiv(dim, CHUNK) * CHUNK for dim in (key_dim, value_dim))
    columns = WARPGROUPS * plan.columns
    state_shape = (batch, plan.pieces, heads, key_columns, value_columns)
    if entering_BPHKV is not None:
        padding = [(0, whole - dim) for whole, dim in zip(state_shape, entering_BPHKV.shape, strict=True)]
        entering_BPHKV = jnp.pad(entering_BPHKV, padding)
    outputs = q_BTHK is not None
    # Tiles as wide as a block of columns have the fewest bank conflicts, but must not straddle two heads.
    matrices = partial(tiles, width=math.gcd(plan.columns, key_dim, value_dim))
    stage_bytes = 2 * CHUNK * ((1 + outputs) * key_columns + columns) + 8 * CHUNK
    kept_bytes = 2 * CHUNK * columns
    if outputs:
        kept_bytes += 2 * (columns * (CHUNK + key_columns) + WARPGROUPS * CHUNK * CHUNK)
    stages = most_stages(stage_bytes, kept_bytes)
    o_BTHV, leaving_BPHKV = plgpu.kernel(
        partial(_kernel, plan=plan, heads=heads, stages=stages, reverse=reverse),
        out_type=(
            jax.ShapeDtypeStruct(v_BTHV.shape, v_BTHV.dtype) if outputs else None,
            jax.ShapeDtypeStruct(state_shape, jnp.float32),
        ),
        grid=(batch * heads, plan.pieces, value_columns // columns),
        grid_names=(HEAD, PIECE, COLUMNS),
        num_threads=WARPGROUPS,
        thread_name=WARPGROUP,
        scratch_types={
            "q": matrices(stages, CHUNK, key_columns) if outputs else None,
            "k": matrices(stages, CHUNK, key_columns),
            "v": matrices(stages, CHUNK, columns),
            "borders": None if borders_B2S is None else plgpu.SMEM((stages, 2, CHUNK), jnp.int32),
            "scores": matrices(WARPGROUPS, CHUNK, CHUNK) if outputs else None,
            "o": matrices(WARPGROUPS, CHUNK, plan.columns) if outputs else None,
            "decayed_v": matrices(WARPGROUPS, CHUNK, plan.columns),
            "state": matrices(WARPGROUPS, key_columns, plan.columns) if outputs else None,
            "loaded": plgpu.Barrier(num_arrivals=2 + outputs + (borders_B2S is not None), num_barriers=stages),
            "used": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"lightning_attention_{'reverse_' * reverse}{'sweep' if outputs else 'states'}",
    )(q_BTHK, k_BTHK, v_BTHV, log_decay_H, borders_B2S, entering_BPHKV)
    # A Mosaic GPU kernel types its results as varying over no mesh axis.
    o_BTHV = vary_like(o_BTHV, v_BTHV) if outputs else None
    return o_BTHV, vary_like(leaving_BPHKV[..., :key_dim, :value_dim], v_BTHV)


def _kernel(
    q_BTHK,
    k_BTHK,
    v_BTHV,
    log_decay_H,
    borders_B2S,
    entering_BPHKV,
    o_BTHV,
    leaving_BPHKV,
    *,
    q,
    k,
    v,
    borders,
    scores,
    o,
    decayed_v,
    state,
    loaded,
    used,
    plan,
    heads,
    stages,
    reverse,
):
    """In shared memory: `q`, `k`, `v`, `borders` of each stage; the rest of each warpgroup."""
    b, h = lax.div(lax.axis_index(HEAD), heads), lax.rem(lax.axis_index(HEAD), heads)
    p, warpgroup = lax.axis_index(PIECE), lax.axis_index(WARPGROUP)
    piece = Piece(plan, p, reverse=reverse)
    first_column = lax.axis_index(COLUMNS) * WARPGROUPS * plan.columns

    def load(step):
        stage, tokens = lax.rem(step, stages), pl.ds(piece.start(step), CHUNK)
        all_columns = pl.ds(p * 0, k.shape[-1])
        if q is not None:
            plgpu.copy_gmem_to_smem(q_BTHK.at[b, tokens, h, all_columns], q.at[stage], loaded.at[stage])
        plgpu.copy_gmem_to_smem(k_BTHK.at[b, tokens, h, all_columns], k.at[stage], loaded.at[stage])
        own_columns = pl.ds(first_column, v.shape[-1])
        plgpu.copy_gmem_to_smem(v_BTHV.at[b, tokens, h, own_columns], v.at[stage], loaded.at[stage])
        if borders is not None:
            plgpu.copy_gmem_to_smem(borders_B2S.at[b, :, tokens], borders.at[stage], loaded.at[stage])

    @pl.when(warpgroup == 0)
    def _():
        @pl.loop(0, jnp.minimum(stages, piece.steps))
        def _(step):
            load(step)

    def leave(step):
        plgpu.barrier_arrive(used.at[lax.rem(step, stages)])

        # The stage of the chunk before: the other warpgroup may still be at this one.
        @pl.when((warpgroup == 0) & (step > 0) & (step - 1 + stages < piece.steps))
        def _():
            plgpu.barrier_wait(used.at[lax.rem(step - 1, stages)])
            load(step - 1 + stages)

    log_decay = log_decay_H[h]
    decays_CC = decays_within(log_decay, reverse=reverse)
    columns = pl.ds(first_column + warpgroup * plan.columns, plan.columns)

    def advance(step, state_KW):
        stage = lax.rem(step, stages)
        plgpu.barrier_wait(loaded.at[stage])
        borders_2C = None if borders is None else borders.at[stage]
        chunk = Chunk(log_decay, piece.start(step), plan.length, borders_2C, reverse=reverse)
        v_CW = v.at[stage, :, pl.ds(warpgroup * plan.columns, plan.columns)]
        leaving_CW = across_columns(chunk.leaving(), plan.columns)
        decayed_v[warpgroup] = (plgpu.load(v_CW, layout=MATRIX) * leaving_CW).astype(jnp.bfloat16)
        to_state = transpose(k.at[stage]), decayed_v.at[warpgroup]
        # All that is read of a stage is read before the fence of commit_smem, which orders it against the copies to
        # come.
        across = chunk.across()
        if q is None:
            plgpu.commit_smem()
            (added_KW,) = matmuls(to_state)
            state_KW = across * state_KW + added_KW
            leave(step)
            return state_KW
        entering_CW = across_columns(chunk.entering(), plan.columns)
        (scores_CC,) = matmuls((q.at[stage], transpose(k.at[stage])))
        scores[warpgroup] = chunk.within(scores_CC, decays_CC).astype(jnp.bfloat16)
        plgpu.commit_smem()
        from_chunk_CW, from_state_CW = matmuls((scores.at[warpgroup], v_CW), (q.at[stage], state.at[warpgroup]))
        o_CW = from_chunk_CW + entering_CW * from_state_CW
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        o[warpgroup] = o_CW.astype(jnp.bfloat16)
        (added_KW,) = matmuls(to_state)
        state_KW = across * state_KW + added_KW
        leave(step)
        state[warpgroup] = state_KW.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o.at[warpgroup], o_BTHV.at[b, pl.ds(piece.start(step), CHUNK), h, columns])
        return state_KW

    if entering_BPHKV is None:
        state_KW = plgpu.layout_cast(jnp.zeros((k.shape[-1], plan.columns), jnp.float32), MATRIX)
    else:
        # Times one, so that in shard_map it has the type of the states to come, which vary over no mesh axis.
        state_KW = 1.0 * plgpu.load(entering_BPHKV.at[b, p, h, :, columns], layout=MATRIX, optimized=False)
    if q is not None:
        state[warpgroup] = state_KW.astype(jnp.bfloat16)
        plgpu.commit_smem()
    leaving_BPHKV[b, p, h, :, columns] = lax.fori_loop(0, piece.steps, advance, state_KW)
    plgpu.wait_smem_to_gmem(0)

    # A barrier is left with every phase waited for.
    @pl.when(warpgroup == 0)
    def _():
        @pl.loop(jnp.maximum(piece.steps - stages, 0), piece.steps)
        def _(step):
            plgpu.barrier_wait(used.at[lax.rem(step, stages)])
