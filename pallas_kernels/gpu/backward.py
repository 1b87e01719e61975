"""The backward: dq as a sweep of the forward's kernel, dk and dv in one sweep from the last chunk to the first.

Source: Lightning Attention-2 (arXiv 2401.04658) algorithm 2.
Shapes: B batch, T sequence, H heads, K key and value dim, C chunk length (j its rows, i its columns), P pieces of the
sequence, S tokens of whole chunks, W columns of dK and dV of one warpgroup.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.chunk import (
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
from pallas_kernels.gpu.forward import sweep
from pallas_kernels.gpu.pieces import entering_states
from pallas_kernels.gpu.plans import CHUNK, WARPGROUPS, Plan, Plans
from pallas_kernels.varying import vary_like


def backward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    log_decay_H: jax.Array,
    borders_B2S: jax.Array | None,
    states_BPHKK: jax.Array,
    do_BTHK: jax.Array,
    d_final_state_BHKK: jax.Array,
    *,
    plans: Plans,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk, dv and the gradient of the initial state; `states_BPHKK` entered the forward's pieces.

    dq_i = S_i do_i is the forward with do for q, v for k and k for v. dk_j = D_j v_j and dv_j = D_jᵀ k_j are the same
    towards the past, where D sums up q doᵀ.
    """
    decays = log_decay_H, borders_B2S
    dq_BTHK, _ = sweep(do_BTHK, v_BTHK, k_BTHK, *decays, states_BPHKK.mT, plan=plans.forward)
    plan = plans.reverse or plans.forward
    d_states_BPHKK = entering_states(q_BTHK, do_BTHK, *decays, d_final_state_BHKK, plan=plan, reverse=True)
    if plans.reverse:
        dk_BTHK, dv_BTHK, d_leaving_BPHKK = reverse_sweep(
            q_BTHK, k_BTHK, v_BTHK, do_BTHK, *decays, d_states_BPHKK, plan=plan
        )
    else:
        dk_BTHK, _ = sweep(v_BTHK, do_BTHK, q_BTHK, *decays, d_states_BPHKK.mT, plan=plan, reverse=True)
        dv_BTHK, d_leaving_BPHKK = sweep(k_BTHK, q_BTHK, do_BTHK, *decays, d_states_BPHKK, plan=plan, reverse=True)
    return dq_BTHK, dk_BTHK, dv_BTHK, d_leaving_BPHKK[:, 0]


def reverse_sweep(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    do_BTHK: jax.Array,
    log_decay_H: jax.Array,
    borders_B2S: jax.Array | None,
    entering_BPHKK: jax.Array,
    *,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dk, dv and dS before every piece of the sequence [B, P, H, K, K] in fp32.

    T is the plan's length, or more with zeros behind it; the entering states are dS behind each piece.
    """
    batch, _, heads, dim = k_BTHK.shape
    whole = WARPGROUPS * plan.columns
    state_shape = (batch, plan.pieces, heads, whole, whole)
    beyond = ((0, 0),) * 3 + ((0, whole - dim),) * 2
    # Tiles as wide as a block of columns have the fewest bank conflicts, but must not straddle two heads.
    matrices = partial(tiles, width=math.gcd(plan.columns, dim))
    stage_bytes = 2 * CHUNK * 4 * whole + 8 * CHUNK
    kept_bytes = 2 * (3 * CHUNK * whole + WARPGROUPS * CHUNK * CHUNK + whole * whole)
    stages = most_stages(stage_bytes, kept_bytes)
    dv_BTHK, dk_BTHK, leaving_BPHKK = plgpu.kernel(
        partial(_kernel, plan=plan, heads=heads, stages=stages),
        out_type=(
            jax.ShapeDtypeStruct(v_BTHK.shape, v_BTHK.dtype),
            jax.ShapeDtypeStruct(k_BTHK.shape, k_BTHK.dtype),
            jax.ShapeDtypeStruct(state_shape, jnp.float32),
        ),
        grid=(batch * heads, plan.pieces),
        grid_names=(HEAD, PIECE),
        num_threads=WARPGROUPS,
        thread_name=WARPGROUP,
        scratch_types={
            "kv": matrices(stages, 2, CHUNK, whole),
            "q_do": matrices(stages, 2, CHUNK, whole),
            "borders": None if borders_B2S is None else plgpu.SMEM((stages, 2, CHUNK), jnp.int32),
            "scores": matrices(2, CHUNK, CHUNK),
            "decayed_do": matrices(WARPGROUPS, CHUNK, plan.columns),
            "state": matrices(whole, whole),
            "gradients": matrices(2, WARPGROUPS, CHUNK, plan.columns),
            "loaded": plgpu.Barrier(num_arrivals=4 + (borders_B2S is not None), num_barriers=stages),
            "written": plgpu.Barrier(num_arrivals=WARPGROUPS),
            "read": plgpu.Barrier(num_arrivals=WARPGROUPS),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="lightning_attention_dk_dv",
    )(q_BTHK, k_BTHK, v_BTHK, do_BTHK, log_decay_H, borders_B2S, jnp.pad(entering_BPHKK, beyond))
    # A Mosaic GPU kernel types its results as varying over no mesh axis.
    return tuple(vary_like(x, v_BTHK) for x in (dk_BTHK, dv_BTHK, leaving_BPHKK[..., :dim, :dim]))


def _kernel(
    q_BTHK,
    k_BTHK,
    v_BTHK,
    do_BTHK,
    log_decay_H,
    borders_B2S,
    entering_BPHKK,
    dv_BTHK,
    dk_BTHK,
    leaving_BPHKK,
    *,
    kv,
    q_do,
    borders,
    scores,
    decayed_do,
    state,
    gradients,
    loaded,
    written,
    read,
    plan,
    heads,
    stages,
):
    """The first warpgroup computes Aᵀ and half of the columns of dV, dK and dS; the second dAᵀ and the other half.

    In shared memory: `kv`, `q_do`, `borders` of each stage; Aᵀ and dAᵀ in `scores`, dS in `state`, written by both
    warpgroups for both; `decayed_do` and `gradients` of each warpgroup.
    """
    b, h = lax.div(lax.axis_index(HEAD), heads), lax.rem(lax.axis_index(HEAD), heads)
    p, warpgroup = lax.axis_index(PIECE), lax.axis_index(WARPGROUP)
    piece = Piece(plan, p, reverse=True)
    columns = pl.ds(warpgroup * plan.columns, plan.columns)

    def load(step):
        stage, tokens = lax.rem(step, stages), pl.ds(piece.start(step), CHUNK)
        all_columns = pl.ds(p * 0, kv.shape[-1])
        for x_BTHK, x in (
            (k_BTHK, kv.at[stage, 0]),
            (v_BTHK, kv.at[stage, 1]),
            (q_BTHK, q_do.at[stage, 0]),
            (do_BTHK, q_do.at[stage, 1]),
        ):
            plgpu.copy_gmem_to_smem(x_BTHK.at[b, tokens, h, all_columns], x, loaded.at[stage])
        if borders is not None:
            plgpu.copy_gmem_to_smem(borders_B2S.at[b, :, tokens], borders.at[stage], loaded.at[stage])

    @pl.when(warpgroup == 0)
    def _():
        @pl.loop(0, jnp.minimum(stages, piece.steps))
        def _(step):
            load(step)

    log_decay = log_decay_H[h]
    decays_CC = decays_within(log_decay, reverse=True)

    def advance(step, state_KW):
        stage = lax.rem(step, stages)
        plgpu.barrier_wait(loaded.at[stage])
        borders_2C = None if borders is None else borders.at[stage]
        chunk = Chunk(log_decay, piece.start(step), plan.length, borders_2C, reverse=True)
        leaving_CW = across_columns(chunk.leaving(), plan.columns)
        do_CW = plgpu.load(q_do.at[stage, 1, :, columns], layout=MATRIX)
        decayed_do[warpgroup] = (do_CW * leaving_CW).astype(jnp.bfloat16)
        (scores_CC,) = matmuls((kv.at[stage, warpgroup], transpose(q_do.at[stage, warpgroup])))
        scores[warpgroup] = chunk.within(scores_CC, decays_CC).astype(jnp.bfloat16)
        # All that is read of a stage is read before the fence of commit_smem, which orders it against the copies to
        # come.
        entering_CW, across = across_columns(chunk.entering(), plan.columns), chunk.across()
        plgpu.commit_smem()
        plgpu.barrier_arrive(written)
        plgpu.barrier_wait(written)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for n, state_WK in enumerate((state.at[:, columns], transpose(state.at[columns, :]))):
            from_chunk_CW, from_state_CW = matmuls(
                (scores.at[n], q_do.at[stage, 1 - n, :, columns]), (kv.at[stage, n], state_WK)
            )
            gradients[n, warpgroup] = (from_chunk_CW + entering_CW * from_state_CW).astype(jnp.bfloat16)
        (added_KW,) = matmuls((transpose(q_do.at[stage, 0]), decayed_do.at[warpgroup]))
        plgpu.barrier_arrive(read)
        state_KW = across * state_KW + added_KW
        plgpu.barrier_wait(read)

        @pl.when((warpgroup == 0) & (step + stages < piece.steps))
        def _():
            load(step + stages)

        state[:, columns] = state_KW.astype(jnp.bfloat16)
        plgpu.commit_smem()
        tokens = pl.ds(piece.start(step), CHUNK)
        for n, x_BTHK in enumerate((dv_BTHK, dk_BTHK)):
            plgpu.copy_smem_to_gmem(gradients.at[n, warpgroup], x_BTHK.at[b, tokens, h, columns])
        return state_KW

    # Times one, so that in shard_map it has the type of the states to come, which vary over no mesh axis.
    state_KW = 1.0 * plgpu.load(entering_BPHKK.at[b, p, h, :, columns], layout=MATRIX, optimized=False)
    state[:, columns] = state_KW.astype(jnp.bfloat16)
    leaving_BPHKK[b, p, h, :, columns] = lax.fori_loop(0, piece.steps, advance, state_KW)
    plgpu.wait_smem_to_gmem(0)
