"""The backward as sweeps of the forward's kernel: each gradient is the same recurrence with other operands.

Source: Lightning Attention-2 (arXiv 2401.04658) algorithm 2.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, P pieces of the sequence, S tokens of whole chunks.
"""

import jax

from pallas_kernels.gpu.forward import sweep
from pallas_kernels.gpu.pieces import entering_states
from pallas_kernels.gpu.plans import Plan


def backward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    borders_B2S: jax.Array | None,
    states_BPHKV: jax.Array,
    do_BTHV: jax.Array,
    d_final_state_BHKV: jax.Array,
    *,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk, dv and the gradient of the initial state; `states_BPHKV` entered the forward's pieces.

    dq_i = S_i do_i is the forward with do for q, v for k and k for v. dk_j = D_j v_j and dv_j = D_jᵀ k_j are the same
    towards the past, where D sums up q doᵀ.
    """
    decays = log_decay_H, borders_B2S
    dq_BTHK, _ = sweep(do_BTHV, v_BTHV, k_BTHK, *decays, states_BPHKV.mT, plan=plan)
    d_states_BPHKV = entering_states(q_BTHK, do_BTHV, *decays, d_final_state_BHKV, plan=plan, reverse=True)
    dk_BTHK, _ = sweep(v_BTHV, do_BTHV, q_BTHK, *decays, d_states_BPHKV.mT, plan=plan, reverse=True)
    dv_BTHV, d_leaving_BPHKV = sweep(k_BTHK, q_BTHK, do_BTHV, *decays, d_states_BPHKV, plan=plan, reverse=True)
    return dq_BTHK, dk_BTHK, dv_BTHV, d_leaving_BPHKV[:, 0]
