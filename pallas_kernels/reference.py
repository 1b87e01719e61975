"""Lightning attention as the recurrence that defines it, one token at a time: the oracle of every faster form.

Source: MiniMax-01 (arXiv 2501.08313) section 2.2, with the decay of TransNormerLLM (arXiv 2307.14995).
Shapes: B batch, T sequence, H heads, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp
from jax import lax


def recurrent_lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    segment_ids_BT: jax.Array | None,
    initial_state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """S_t = λ S_{t-1} + k_t v_tᵀ and o_t = S_tᵀ q_t, computed in the state's dtype and differentiated by JAX.

    Returns o [B, T, H, V] in v's dtype and the final state [B, H, K, V]. Training through it keeps every S_t.
    """
    dtype = initial_state_BHKV.dtype
    decay_H11 = jnp.exp(log_decay_H.astype(dtype))[:, None, None]
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros(q_BTHK.shape[:2], jnp.int32)
    previous_BT = jnp.concatenate([segment_ids_BT[:, :1], segment_ids_BT[:, :-1]], axis=1)
    keep_BT = segment_ids_BT == previous_BT

    def token(state_BHKV, inputs):
        q_BHK, k_BHK, v_BHV, keep_B = inputs
        state_BHKV = jnp.where(keep_B[:, None, None, None], decay_H11 * state_BHKV, 0)
        state_BHKV += k_BHK[..., :, None] * v_BHV[..., None, :]
        return state_BHKV, (q_BHK[..., :, None] * state_BHKV).sum(-2)

    by_token = (q_BTHK.astype(dtype), k_BTHK.astype(dtype), v_BTHV.astype(dtype), keep_BT)
    final_state_BHKV, o_TBHV = lax.scan(token, initial_state_BHKV, tuple(x.swapaxes(0, 1) for x in by_token))
    return o_TBHV.swapaxes(0, 1).astype(v_BTHV.dtype), final_state_BHKV
