"""Lightning attention on a TPU: the forward and the backward kernel as one differentiable function.

Source: Lightning Attention-2 (arXiv 2401.04658); MiniMax-01 (arXiv 2501.08313) section 2.2.
Shapes: B batch, T sequence, H heads, K key dim, V value dim, N chunks.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.backward import backward
from pallas_kernels.tpu.block_sizes import ANY_TPU, HEAD_DIMS, BlockSizes, choose_block_sizes, generation
from pallas_kernels.tpu.chunk import find_borders
from pallas_kernels.tpu.forward import forward

DTYPES = ("bfloat16", "float32")


def obstacle(key_dim: int, value_dim: int, dtype: jnp.dtype) -> str | None:
    """Why the kernels are not for this process's TPU and these inputs; None if they are."""
    if generation() is None:
        return f"no block sizes for {jax.devices()[0].device_kind}"
    if key_dim != value_dim or key_dim not in HEAD_DIMS:
        return f"the TPU kernel has head dims {', '.join(map(str, HEAD_DIMS))}, not {key_dim} and {value_dim}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"the TPU kernel takes {' and '.join(DTYPES)}, not {jnp.dtype(dtype).name}"
    return None


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    segment_ids_BT: jax.Array | None,
    initial_state_BHKV: jax.Array,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """o and the final state by the kernels, with the block sizes of this process's TPU, elsewhere of any TPU.

    On another platform it can be lowered for a TPU, or run in `pltpu.force_tpu_interpret_mode`. Head dims other than
    `HEAD_DIMS` work where the compiler finds room for them.

    Raises:
      ValueError: on fp64 inputs, and on heads wider than 256.
    """
    _, length, heads, key_dim = q_BTHK.shape
    value_dim, dtype = v_BTHV.shape[-1], q_BTHK.dtype.name
    if dtype not in DTYPES:
        raise ValueError(f"lightning_attention: pallas_tpu takes {' or '.join(DTYPES)}, not {dtype}; use xla")
    if max(key_dim, value_dim) > max(HEAD_DIMS):
        raise ValueError(
            f"lightning_attention: pallas_tpu has heads of up to {max(HEAD_DIMS)} dims, not {key_dim} and {value_dim}; "
            "use xla"
        )
    sizes = choose_block_sizes(generation() or ANY_TPU, length, heads, key_dim, value_dim, dtype, chunk_size)
    return lightning_attention_in_blocks(q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, initial_state_BHKV, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def lightning_attention_in_blocks(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_H: jax.Array,
    segment_ids_BT: jax.Array | None,
    initial_state_BHKV: jax.Array,
    block_sizes: BlockSizes,
) -> tuple[jax.Array, jax.Array]:
    """Operands of matmuls have q's dtype; sums, decays and states are fp32. `log_decay_H` has no gradient."""
    outputs, _ = _run_forward(
        q_BTHK, k_BTHK, v_BTHV, log_decay_H, segment_ids_BT, initial_state_BHKV, block_sizes, save_states=False
    )
    return outputs


def _run_forward(q, k, v, log_decay_H, segment_ids_BT, initial_state_BHKV, block_sizes, *, save_states):
    borders = find_borders(segment_ids_BT, block_sizes.chunk)
    q_BTA, k_BTA, v_BTU = (_fuse_heads(x) for x in (q, k, v))
    o_BTU, final_state_BHKV, states_BNHKV = forward(
        q_BTA,
        k_BTA,
        v_BTU,
        log_decay_H,
        borders,
        initial_state_BHKV,
        chunk=block_sizes.chunk,
        heads=block_sizes.forward_heads,
        save_states=save_states,
    )
    residuals = q_BTA, k_BTA, v_BTU, log_decay_H, borders, states_BNHKV
    return (_split_heads(o_BTU, q.shape[2]), final_state_BHKV), residuals


def _run_backward(block_sizes, residuals, cotangents):
    do_BTHV, d_final_state_BHKV = cotangents
    heads = do_BTHV.shape[2]
    dq_BTA, dk_BTA, dv_BTU, d_initial_state_BHKV = backward(
        *residuals,
        _fuse_heads(do_BTHV),
        d_final_state_BHKV,
        chunk=block_sizes.chunk,
        heads=block_sizes.backward_heads,
    )
    gradients = (_split_heads(x, heads) for x in (dq_BTA, dk_BTA, dv_BTU))
    return *gradients, None, None, d_initial_state_BHKV


def _fuse_heads(x_BTHK: jax.Array) -> jax.Array:
    return x_BTHK.reshape(*x_BTHK.shape[:2], -1)


def _split_heads(x_BTA: jax.Array, heads: int) -> jax.Array:
    return x_BTA.reshape(*x_BTA.shape[:2], heads, -1)


lightning_attention_in_blocks.defvjp(partial(_run_forward, save_states=True), _run_backward)
