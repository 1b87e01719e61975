"""The step that generates text: one token for each of many sequences.

Source: MiniMax-01 (arXiv 2501.08313) section 2.2.
Shapes: B sequences, H heads, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp


def lightning_attention_step(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """S ← λ S + k vᵀ, o = Sᵀ q, λ = exp(log_decay): `lightning_attention` of a single token, in the state's dtype.

    The step costs what it takes to read and write the state. Under `jit` with the state donated it is updated in place;
    XLA makes one pass over it, in which both lines are computed.

    Args:
      q, k: [B, H, K].
      v: [B, H, V].
      log_decay: [H], ≤ 0.
      state: [B, H, K, V], at least fp32; zeros before a sequence's first token.

    Returns:
      o [B, H, V] in v's dtype, and the state behind the token.

    Raises:
      ValueError: on shapes or dtypes other than these.
    """
    expected = {"k": q.shape, "v": (*q.shape[:2], v.shape[-1]), "log_decay": q.shape[1:2]}
    expected["state"] = (*q.shape, v.shape[-1])
    actual = {"k": k.shape, "v": v.shape, "log_decay": jnp.shape(log_decay), "state": state.shape}
    for name, shape in actual.items():
        if shape != expected[name]:
            raise ValueError(f"lightning_attention_step: {name} has shape {shape}; it must be {expected[name]}")
    if state.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"lightning_attention_step: the state is {state.dtype}; it must be float32 or float64")
    q_BHK, k_BHK, v_BHV = (x.astype(state.dtype) for x in (q, k, v))
    decay_H11 = jnp.exp(jnp.asarray(log_decay, state.dtype))[:, None, None]
    state = decay_H11 * state + k_BHK[..., :, None] * v_BHV[..., None, :]
    # Not an einsum: a product that is summed joins the pass that makes the state, on every platform.
    return (q_BHK[..., :, None] * state).sum(-2).astype(v.dtype), state
