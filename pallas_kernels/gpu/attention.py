"""Lightning attention on a Hopper GPU: the forward and the backward kernel as one differentiable function.

Source: Lightning Attention-2 (arXiv 2401.04658); MiniMax-01 (arXiv 2501.08313) section 2.2.
Shapes: B batch, T sequence, H heads, K key dim, V value dim.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.backward import backward
from pallas_kernels.gpu.chunk import find_borders
from pallas_kernels.gpu.forward import sweep
from pallas_kernels.gpu.pieces import entering_states
from pallas_kernels.gpu.plans import CHUNK, TILE_ROWS, Plans, choose_plans, obstacle_of_inputs


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    segment_ids_BT: jax.Array | None,
    initial_state_BHKV: jax.Array,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """o and the final state by the kernels; elsewhere it can be lowered for a GPU, or interpreted on a CPU.

    A length that is no multiple of 8 costs a copy of q, k, v and o: the copy engine moves tiles of 8 tokens.

    Raises:
      ValueError: on dtypes and head dims that the kernels do not have, and chunks other than of 64 tokens.
    """
    batch, length, heads, key_dim = q_BTHK.shape
    obstacle = obstacle_of_inputs(key_dim, v_BTHV.shape[-1], q_BTHK.dtype)
    if obstacle:
        raise ValueError(f"lightning_attention: {obstacle}; use xla")
    if chunk_size not in (None, CHUNK):
        raise ValueError(f"lightning_attention: chunk_size is {chunk_size}; pallas_gpu has chunks of {CHUNK} tokens")
    if length % TILE_ROWS:
        padding = ((0, 0), (0, -length % TILE_ROWS), (0, 0), (0, 0))
        q_BTHK, k_BTHK, v_BTHV = (jnp.pad(x, padding) for x in (q_BTHK, k_BTHK, v_BTHV))
    plans = choose_plans(batch, length, heads, key_dim)
    o_BTHV, final_state_BHKV = lightning_attention_by_plans(
        q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, initial_state_BHKV, plans
    )
    return o_BTHV[:, :length], final_state_BHKV


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def lightning_attention_by_plans(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    segment_ids_BT: jax.Array | None,
    initial_state_BHKV: jax.Array,
    plans: Plans,
) -> tuple[jax.Array, jax.Array]:
    """T is the plans' length rounded up to whole tiles; what lies behind it is zero.

    Operands of matmuls are bf16; sums, decays and states are fp32. `log_decay_H` has no gradient.
    """
    outputs, _ = _run_forward(q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, initial_state_BHKV, plans)
    return outputs


def _run_forward(q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, initial_state_BHKV, plans):
    operands = k_BTHK, v_BTHV, log_decay_H, find_borders(segment_ids_BT)
    states_BPHKV = entering_states(*operands, initial_state_BHKV, plan=plans.forward)
    o_BTHV, leaving_BPHKV = sweep(q_BTHK, *operands, states_BPHKV, plan=plans.forward)
    return (o_BTHV, leaving_BPHKV[:, -1]), (q_BTHK, *operands, states_BPHKV)


def _run_backward(plans, residuals, cotangents):
    dq_BTHK, dk_BTHK, dv_BTHV, d_initial_state_BHKV = backward(*residuals, *cotangents, plans=plans)
    return dq_BTHK, dk_BTHK, dv_BTHV, None, None, d_initial_state_BHKV


lightning_attention_by_plans.defvjp(_run_forward, _run_backward)
