"""Lightning attention chunk by chunk in plain XLA, with its own backward: linear in T in time and in memory.

Source: Lightning Attention-2 (arXiv 2401.04658) algorithms 1 and 2; MiniMax-01 (arXiv 2501.08313) section 2.2.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, C chunk length (i, j its queries and keys), N chunks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.varying import vary_like


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def chunked_lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    segment_ids_BT: jax.Array | None,
    initial_state_BHKV: jax.Array,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in the initial state's.

    Matmuls take operands of q's dtype and sum in the state's. `log_decay_H` has no gradient.
    """
    outputs, _ = _forward(q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, initial_state_BHKV, chunk_size)
    return outputs


class Decays(NamedTuple):
    """Powers of λ = exp(log_decay) that weight one chunk; 0 where a border between documents lies in the way.

    Each is the exponential of log_decay times a distance ≥ 0, so none can overflow; B is 1 without documents.
    """

    within_BHCC: jax.Array  # λ^(i-j), 0 above the diagonal: key j as query i sees it
    from_start_BHC1: jax.Array  # λ^(i+1): the incoming state as query i sees it
    to_end_BHC1: jax.Array  # λ^(C-1-j): key j as the outgoing state holds it
    across_BH11: jax.Array  # λ^C: the incoming state as the outgoing state holds it


def _decays(log_decay_H: jax.Array, size: int) -> Decays:
    i_C = jnp.arange(size)
    distance_CC = i_C[:, None] - i_C[None, :]

    def power(distance):
        return jnp.exp(log_decay_H[None, :, None, None] * distance)

    return Decays(
        within_BHCC=jnp.where(distance_CC >= 0, power(jnp.maximum(distance_CC, 0)), 0),
        from_start_BHC1=power(i_C[:, None] + 1),
        to_end_BHC1=power(size - 1 - i_C[:, None]),
        across_BH11=power(jnp.full((1, 1), size)),
    )


def _isolate(decays: Decays, documents_BS: jax.Array | None) -> Decays:
    """Zeroes what crosses a border; `documents_BS` holds the token before the chunk and then its C tokens."""
    if documents_BS is None:
        return decays
    before_B1, inside_BC, end_B1 = documents_BS[:, :1], documents_BS[:, 1:], documents_BS[:, -1:]
    return Decays(
        within_BHCC=jnp.where(inside_BC[:, None, :, None] == inside_BC[:, None, None, :], decays.within_BHCC, 0),
        from_start_BHC1=jnp.where((inside_BC == before_B1)[:, None, :, None], decays.from_start_BHC1, 0),
        to_end_BHC1=jnp.where((inside_BC == end_B1)[:, None, :, None], decays.to_end_BHC1, 0),
        across_BH11=jnp.where((before_B1 == end_B1)[:, None, :, None], decays.across_BH11, 0),
    )


def _count_documents(segment_ids_BT: jax.Array | None) -> jax.Array | None:
    """Numbers the documents of a row 0, 1, ... at each change of id, behind a 0 for the initial state's."""
    if segment_ids_BT is None:
        return None
    border_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return jnp.pad(jnp.cumsum(border_BT, axis=1, dtype=jnp.int32), ((0, 0), (2, 0)))


def _chunks(length: int, chunk_size: int) -> tuple[int, int]:
    """Number of whole chunks, and the length of the shorter one behind them (0 if there is none)."""
    return length // chunk_size, length % chunk_size


# Chunks are sliced from, and written into, arrays that keep the layout [B, T, H, K] of the projections around them:
# transposing a chunk in cache is cheaper than a second copy of every tensor (1.5x at 64K tokens on a CPU).
def _load(x_BTHK: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x_BTHK, start, size, axis=1).swapaxes(1, 2)


def _store(x_BTHK: jax.Array, chunk_BHCK: jax.Array, start: jax.Array | int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x_BTHK, chunk_BHCK.swapaxes(1, 2).astype(x_BTHK.dtype), start, axis=1)


def _zeros_like(x: jax.Array) -> jax.Array:
    return vary_like(jnp.zeros_like(x), x)


def _load_documents(documents_BT: jax.Array | None, start: jax.Array | int, size: int) -> jax.Array | None:
    return None if documents_BT is None else lax.dynamic_slice_in_dim(documents_BT, start, size + 1, axis=1)


def _matmuls(operand_dtype: jnp.dtype, state_dtype: jnp.dtype):
    """einsum of two operands rounded to `operand_dtype`, accumulated in `state_dtype`.

    An accelerator's default for fp32 operands is bf16 or TF32 passes, hence HIGHEST; bf16 operands have only one speed.
    """
    precision = lax.Precision.DEFAULT if operand_dtype == jnp.bfloat16 else lax.Precision.HIGHEST

    def einsum(subscripts, x, y):
        x, y = x.astype(operand_dtype), y.astype(operand_dtype)
        return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=state_dtype)

    return einsum


def _forward(q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, initial_state_BHKV, chunk_size):
    einsum = _matmuls(q_BTHK.dtype, initial_state_BHKV.dtype)
    documents_BT = _count_documents(segment_ids_BT)
    whole, rest = _chunks(q_BTHK.shape[1], chunk_size)

    def chunk(n, carry, decays, size):
        state_BHKV, states_NBHKV, o_BTHV = carry
        start = n * chunk_size
        states_NBHKV = lax.dynamic_update_index_in_dim(states_NBHKV, state_BHKV.astype(states_NBHKV.dtype), n, axis=0)
        q_BHCK, k_BHCK, v_BHCV = (_load(x, start, size) for x in (q_BTHK, k_BTHK, v_BTHV))
        within, from_start, to_end, across = _isolate(decays, _load_documents(documents_BT, start, size))
        scores_BHCC = within * einsum("bhik,bhjk->bhij", q_BHCK, k_BHCK)
        o_BHCV = einsum("bhij,bhjv->bhiv", scores_BHCC, v_BHCV)
        o_BHCV += from_start * einsum("bhik,bhkv->bhiv", q_BHCK, state_BHKV)
        state_BHKV = across * state_BHKV + einsum("bhjk,bhjv->bhkv", to_end * k_BHCK, v_BHCV)
        return state_BHKV, states_NBHKV, _store(o_BTHV, o_BHCV, start)

    # The backward reads the saved states as matmul operands only, so their dtype loses nothing.
    states_NBHKV = jnp.zeros((whole + bool(rest), *initial_state_BHKV.shape), q_BTHK.dtype)
    carry = (initial_state_BHKV, vary_like(states_NBHKV, q_BTHK), _zeros_like(v_BTHV))
    if whole:
        decays = _decays(log_decay_H, chunk_size)
        carry = lax.fori_loop(0, whole, lambda n, carry: chunk(n, carry, decays, chunk_size), carry)
    if rest:
        carry = chunk(whole, carry, _decays(log_decay_H, rest), rest)
    final_state_BHKV, states_NBHKV, o_BTHV = carry
    return (o_BTHV, final_state_BHKV), (q_BTHK, k_BTHK, v_BTHV, log_decay_H, documents_BT, states_NBHKV)


def _backward(chunk_size, residuals, cotangents):
    q_BTHK, k_BTHK, v_BTHV, log_decay_H, documents_BT, states_NBHKV = residuals
    do_BTHV, d_final_state_BHKV = cotangents
    einsum = _matmuls(q_BTHK.dtype, d_final_state_BHKV.dtype)
    whole, rest = _chunks(q_BTHK.shape[1], chunk_size)

    def chunk(n, carry, decays, size):
        d_state_BHKV, dq_BTHK, dk_BTHK, dv_BTHV = carry
        start, state_BHKV = n * chunk_size, states_NBHKV[n]
        q_BHCK, k_BHCK, v_BHCV, do_BHCV = (_load(x, start, size) for x in (q_BTHK, k_BTHK, v_BTHV, do_BTHV))
        within, from_start, to_end, across = _isolate(decays, _load_documents(documents_BT, start, size))
        scores_BHCC = within * einsum("bhik,bhjk->bhij", q_BHCK, k_BHCK)
        d_scores_BHCC = within * einsum("bhiv,bhjv->bhij", do_BHCV, v_BHCV)
        dq_BHCK = einsum("bhij,bhjk->bhik", d_scores_BHCC, k_BHCK)
        dq_BHCK += from_start * einsum("bhiv,bhkv->bhik", do_BHCV, state_BHKV)
        dk_BHCK = einsum("bhij,bhik->bhjk", d_scores_BHCC, q_BHCK)
        dk_BHCK += to_end * einsum("bhjv,bhkv->bhjk", v_BHCV, d_state_BHKV)
        dv_BHCV = einsum("bhij,bhiv->bhjv", scores_BHCC, do_BHCV)
        dv_BHCV += to_end * einsum("bhjk,bhkv->bhjv", k_BHCK, d_state_BHKV)
        d_state_BHKV = across * d_state_BHKV + einsum("bhik,bhiv->bhkv", from_start * q_BHCK, do_BHCV)
        return (
            d_state_BHKV,
            _store(dq_BTHK, dq_BHCK, start),
            _store(dk_BTHK, dk_BHCK, start),
            _store(dv_BTHV, dv_BHCV, start),
        )

    carry = (d_final_state_BHKV, _zeros_like(q_BTHK), _zeros_like(k_BTHK), _zeros_like(v_BTHV))
    if rest:
        carry = chunk(whole, carry, _decays(log_decay_H, rest), rest)
    if whole:
        decays = _decays(log_decay_H, chunk_size)
        carry = lax.fori_loop(0, whole, lambda step, carry: chunk(whole - 1 - step, carry, decays, chunk_size), carry)
    d_initial_state_BHKV, dq_BTHK, dk_BTHK, dv_BTHV = carry
    return dq_BTHK, dk_BTHK, dv_BTHV, None, None, d_initial_state_BHKV


chunked_lightning_attention.defvjp(_forward, _backward)
