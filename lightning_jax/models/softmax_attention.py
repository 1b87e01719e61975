"""Causal softmax attention with grouped key/value heads that keeps the documents of a packed row apart.

Source: grouped-query attention (arXiv 2305.13245).
Shapes: B batch, T sequence, H query heads, G key/value heads, K head dim.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lightning_jax.models.blocked_attention import blocked_attention, default_block

Implementation = Literal["auto", "xla", "blocked", "cudnn"]


def softmax_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """o_t = Σ_s softmax_s(q_t·k_s / √K) v_s over the tokens s ≤ t of token t's document.

    Args:
      q_BTHK: queries; head h reads key/value head h // (H / G).
      k_BTGK, v_BTGK: keys and values of the queries' dtype, bfloat16, float32 or float64; G divides H.
      segment_ids_BT: integers; a document ends wherever the id changes. None: each row is one document.
      implementation: "blocked" is linear in T in memory on any platform; "xla" keeps the scores of all pairs of tokens;
        "cudnn" is NVIDIA's fused kernel; "auto" takes the fastest that can compute the case.

    Returns:
      o [B, T, H, K] in v's dtype. The softmax is fp32, and fp64 for fp64 inputs ("xla": always fp32).

    Raises:
      ValueError: on shapes or dtypes other than these, and where "cudnn" is asked for and cannot run.
    """
    _check(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, implementation)
    documents_BT = None if segment_ids_BT is None else _number_documents(segment_ids_BT)
    if implementation == "auto":
        # cuDNN would take borders between documents as a [T, T] bias. Blocks need none; on a CPU they beat XLA's
        # [T, T] at every length from 128 up, and on an accelerator one block is all of a short sequence.
        implementation = "blocked" if documents_BT is not None or _cudnn_problem(q_BTHK) else "cudnn"
    if implementation == "blocked":
        return _in_blocks(q_BTHK, k_BTGK, v_BTGK, documents_BT)
    mask = None if documents_BT is None else documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    with jax.default_matmul_precision("highest" if q_BTHK.dtype == jnp.float32 else "default"):
        return jax.nn.dot_product_attention(
            q_BTHK, k_BTGK, v_BTGK, mask=mask, is_causal=True, implementation=implementation
        )


def _number_documents(segment_ids_BT: jax.Array) -> jax.Array:
    """0, 1, ... along each row, so that equal ids that are not neighbours become different documents."""
    border_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return jnp.pad(jnp.cumsum(border_BT, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _cudnn_problem(q_BTHK: jax.Array) -> str | None:
    """Why cuDNN's fused attention cannot run, or None."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "none")  # "9.0" on NVIDIA, "gfx942" on AMD
    if device.platform != "gpu" or not capability[0].isdigit() or float(capability) < 8.0:
        return f"it needs an NVIDIA GPU of the Ampere generation or later, and the device is {device.device_kind}"
    if q_BTHK.dtype != jnp.bfloat16:
        return f"it needs bfloat16, and the inputs are {q_BTHK.dtype}"
    if q_BTHK.shape[-1] > 128 or q_BTHK.shape[-1] % 8:
        return f"it needs a head dim that is a multiple of 8 up to 128, and this one is {q_BTHK.shape[-1]}"
    return None


def _in_blocks(q_BTHK, k_BTGK, v_BTGK, documents_BT):
    batch, length, heads, _ = q_BTHK.shape
    block = default_block(batch, length, heads)
    # Keys that fill up the last block lie behind every real query, so the causal mask hides them.
    fill = ((0, 0), (0, -length % block))
    q_BTHK, k_BTGK, v_BTGK = (jnp.pad(x, (*fill, (0, 0), (0, 0))) for x in (q_BTHK, k_BTGK, v_BTGK))
    if documents_BT is not None:
        documents_BT = jnp.pad(documents_BT, fill, mode="edge")
    return blocked_attention(q_BTHK, k_BTGK, v_BTGK, documents_BT, documents_BT, 0, block)[:, :length]


def _check(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, implementation) -> None:
    q, k, v = q_BTHK.shape, k_BTGK.shape, v_BTGK.shape
    if len(q) != 4 or 0 in q:
        raise ValueError(f"softmax_attention: q has shape {q}; it must be [B, T, H, K], none of them 0")
    if len(k) != 4 or (*k[:2], k[3]) != (*q[:2], q[3]) or k[2] == 0 or q[2] % k[2]:
        raise ValueError(
            f"softmax_attention: k has shape {k}; it must be [B, T, G, K] with q's {q} and G dividing {q[2]}"
        )
    if v != k:
        raise ValueError(f"softmax_attention: v has shape {v}; it must be k's, {k}")
    dtypes = [x.dtype.name for x in (q_BTHK, k_BTGK, v_BTGK)]
    if len(set(dtypes)) > 1 or dtypes[0] not in ("bfloat16", "float32", "float64"):
        raise ValueError(
            f"softmax_attention: q, k, v are {', '.join(dtypes)}; they must all be bfloat16, float32 or float64"
        )
    if segment_ids_BT is not None and segment_ids_BT.shape != q[:2]:
        raise ValueError(
            f"softmax_attention: segment_ids has shape {segment_ids_BT.shape}; it must be [B, T] = {q[:2]}"
        )
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"softmax_attention: implementation is {implementation!r}; it must be one of {get_args(Implementation)}"
        )
    if implementation == "cudnn" and (problem := _cudnn_problem(q_BTHK)):
        raise ValueError(f"softmax_attention: implementation 'cudnn' cannot run: {problem}")
