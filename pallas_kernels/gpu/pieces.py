"""The states between the pieces of a sequence that are swept at the same time.

Source: LASP-2 (arXiv 2502.07563), for the multiprocessors of one GPU instead of devices; with the decay of MiniMax-01
(arXiv 2501.08313) and documents.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, P pieces of the sequence, S tokens of whole chunks,
E = P + 1 edges of the pieces: before the first, between two of them, behind the last.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.gpu.forward import sweep
from pallas_kernels.gpu.plans import CHUNK, Plan


def entering_states(
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    borders_B2S: jax.Array | None,
    state_BHKV: jax.Array,
    *,
    plan: Plan,
    reverse: bool = False,
) -> jax.Array:
    """[B, P, H, K, V]: the states that enter the pieces, from the one that enters the sequence and all keys and values.

    A sweep without outputs sums up each piece from zero; each sum then reaches all pieces behind it, decayed.
    """
    if plan.pieces == 1:
        return state_BHKV[:, None]
    _, sums_BPHKV = sweep(None, k_BTHK, v_BTHV, log_decay_H, borders_B2S, None, plan=plan, reverse=reverse)
    state_B1HKV = state_BHKV[:, None]
    at_edges = (sums_BPHKV, state_B1HKV) if reverse else (state_B1HKV, sums_BPHKV)
    weights_BHEE = _weights_between_edges(log_decay_H, borders_B2S, plan, reverse)
    entering_BEHKV = jnp.einsum(
        "bhef,bfhkv->behkv", weights_BHEE, jnp.concatenate(at_edges, axis=1), precision=lax.Precision.HIGHEST
    )
    return entering_BEHKV[:, 1:] if reverse else entering_BEHKV[:, :-1]


def _weights_between_edges(log_decay_H, borders_B2S, plan, reverse):
    """[B or 1, H, E, E]: λ to the number of tokens from edge f to edge e in the sweep's direction, else 0."""
    tokens = -(-plan.length // (plan.pieces * CHUNK)) * CHUNK
    before_E = np.minimum(np.arange(plan.pieces + 1) * tokens, plan.length)  # tokens before each edge
    distance_EE = before_E[:, None] - before_E[None, :]
    distance_EE = -distance_EE if reverse else distance_EE
    weights_BHEE = jnp.exp(log_decay_H[None, :, None, None] * np.maximum(distance_EE, 0))
    reaches_BHEE = (distance_EE >= 0)[None, None]
    if borders_B2S is not None:
        # Two edges are of the same document if the later one's document begins before the earlier one.
        first_BE = jnp.pad(borders_B2S[:, 0, before_E[1:] - 1], ((0, 0), (1, 0)), constant_values=-1)
        later_BEE = jnp.maximum(first_BE[:, :, None], first_BE[:, None, :])
        reaches_BHEE = reaches_BHEE & (later_BEE < np.minimum(before_E[:, None], before_E[None, :]))[:, None]
    return jnp.where(reaches_BHEE, weights_BHEE, 0)
