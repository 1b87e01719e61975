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

from pallas_kernels.gpu.chunk import MATRIX, Chunk, across_columns, decays_within, matmuls, tiles, transpose
from pallas_kernels.gpu.plans import CHUNK, SHARED_MEMORY, WARPGROUPS, Plan
from pallas_kernels.varying import shape_like

# Axes of the grid, and of the warpgroups in a thread block; meshes around the kernel have other names.
HEAD, PIECE, COLUMNS, WARPGROUP = "kernel_head", "kernel_piece", "kernel_columns", "kernel_warpgroup"
# Three warpgroups of 128 threads share out 64 Ki registers: 128 * (2 * 240 + 24) of them.
REGISTERS_TO_COMPUTE, REGISTERS_TO_LOAD = 240, 24
MOST_STAGES = 4  # chunks loaded ahead


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
    stages = min(MOST_STAGES, (SHARED_MEMORY - kept_bytes) // stage_bytes)
    o_BTHV, leaving_BPHKV = plgpu.kernel(
        partial(_kernel, plan=plan, heads=heads, stages=stages, reverse=reverse),
        out_type=(
            shape_like(v_BTHV.shape, v_BTHV.dtype, v_BTHV) if outputs else None,
            shape_like(state_shape, jnp.float32, v_BTHV),
        ),
        grid=(batch * heads, plan.pieces, value_columns // columns),
        grid_names=(HEAD, PIECE, COLUMNS),
        num_threads=WARPGROUPS + 1,
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
        kernel_name="lightning_attention_sweep" if outputs else "lightning_attention_states",
    )(q_BTHK, k_BTHK, v_BTHV, log_decay_H, borders_B2S, entering_BPHKV)
    return o_BTHV, leaving_BPHKV[..., :key_dim, :value_dim]


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
    piece = lax.axis_index(PIECE)
    warpgroup = lax.axis_index(WARPGROUP)
    first_column = lax.axis_index(COLUMNS) * WARPGROUPS * plan.columns
    chunks = pl.cdiv(plan.length, CHUNK)
    chunks_of_piece = pl.cdiv(chunks, plan.pieces)
    first_chunk = piece * chunks_of_piece
    steps = jnp.minimum(chunks_of_piece, chunks - first_chunk)

    def start(step):
        return (first_chunk + (steps - 1 - step if reverse else step)) * CHUNK

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS_TO_LOAD, action="decrease")

        def load(step, _):
            stage, tokens = lax.rem(step, stages), pl.ds(start(step), CHUNK)

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(used.at[stage])

            all_columns = pl.ds(piece * 0, k.shape[-1])
            if q is not None:
                plgpu.copy_gmem_to_smem(q_BTHK.at[b, tokens, h, all_columns], q.at[stage], loaded.at[stage])
            plgpu.copy_gmem_to_smem(k_BTHK.at[b, tokens, h, all_columns], k.at[stage], loaded.at[stage])
            own_columns = pl.ds(first_column, v.shape[-1])
            plgpu.copy_gmem_to_smem(v_BTHV.at[b, tokens, h, own_columns], v.at[stage], loaded.at[stage])
            if borders is not None:
                plgpu.copy_gmem_to_smem(borders_B2S.at[b, :, tokens], borders.at[stage], loaded.at[stage])

        lax.fori_loop(0, steps, load, None)

        @pl.loop(jnp.maximum(steps - stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(used.at[lax.rem(step, stages)])

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS_TO_COMPUTE, action="increase")
        log_decay = log_decay_H[h]
        decays_CC = decays_within(log_decay, reverse=reverse)
        columns = pl.ds(first_column + warpgroup * plan.columns, plan.columns)

        def advance(step, state_KW):
            stage = lax.rem(step, stages)
            plgpu.barrier_wait(loaded.at[stage])
            borders_2C = None if borders is None else borders.at[stage]
            chunk = Chunk(log_decay, start(step), plan.length, borders_2C, reverse=reverse)
            v_CW = v.at[stage, :, pl.ds(warpgroup * plan.columns, plan.columns)]
            leaving_CW = across_columns(chunk.leaving(), plan.columns)
            decayed_v[warpgroup] = (plgpu.load(v_CW, layout=MATRIX) * leaving_CW).astype(jnp.bfloat16)
            to_state = transpose(k.at[stage]), decayed_v.at[warpgroup]
            if q is None:
                plgpu.commit_smem()
                (added_KW,) = matmuls(to_state)
                state_KW = chunk.across() * state_KW + added_KW
                plgpu.barrier_arrive(used.at[stage])
                return state_KW
            (scores_CC,) = matmuls((q.at[stage], transpose(k.at[stage])))
            scores[warpgroup] = chunk.within(scores_CC, decays_CC).astype(jnp.bfloat16)
            plgpu.commit_smem()
            from_chunk_CW, from_state_CW = matmuls((scores.at[warpgroup], v_CW), (q.at[stage], state.at[warpgroup]))
            o_CW = from_chunk_CW + across_columns(chunk.entering(), plan.columns) * from_state_CW
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o[warpgroup] = o_CW.astype(jnp.bfloat16)
            (added_KW,) = matmuls(to_state)
            state_KW = chunk.across() * state_KW + added_KW
            plgpu.barrier_arrive(used.at[stage])
            state[warpgroup] = state_KW.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o.at[warpgroup], o_BTHV.at[b, pl.ds(start(step), CHUNK), h, columns])
            return state_KW

        if entering_BPHKV is None:
            state_KW = plgpu.layout_cast(jnp.zeros((k.shape[-1], plan.columns), jnp.float32), MATRIX)
        else:
            state_KW = plgpu.load(entering_BPHKV.at[b, piece, h, :, columns], layout=MATRIX, optimized=False)
        if q is not None:
            state[warpgroup] = state_KW.astype(jnp.bfloat16)
            plgpu.commit_smem()
        leaving_BPHKV[b, piece, h, :, columns] = lax.fori_loop(0, steps, advance, state_KW)
        plgpu.wait_smem_to_gmem(0)
