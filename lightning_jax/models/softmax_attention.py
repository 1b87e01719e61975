"""Causal softmax attention with grouped key/value heads that keeps the documents of a packed row apart.

Sources: grouped-query attention (arXiv 2305.13245); the blocked form is FlashAttention-2 (arXiv 2307.08691) section 3.1
in plain XLA.
Shapes: B batch, T sequence, H query heads, G key/value heads, R = H / G query heads that share one, K head dim,
C tokens of a block (i, j its queries and keys), N blocks.
"""

import math
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.varying import vary_like

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
        return _blocked_attention(q_BTHK, k_BTGK, v_BTGK, documents_BT)
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


def _block_size(batch: int, length: int, heads: int) -> int:
    if jax.default_backend() != "cpu":
        return min(512, length)
    # The scores of one pair of blocks, B·H·C² fp32, should stay in a MB of cache; and a sequence of fewer than
    # four blocks computes mostly scores that the causal mask then discards. Measured for B·H from 4 to 64.
    cached = math.isqrt(2**18 // (batch * heads))
    return min(next((size for size in (512, 256, 128) if size <= cached and 4 * size <= length), 64), length)


def _blocked_attention(q_BTHK, k_BTGK, v_BTGK, documents_BT):
    batch, length, heads, dim = q_BTHK.shape
    groups = k_BTGK.shape[2]
    block = _block_size(batch, length, heads)
    # Keys that fill up the last block lie behind every real query, so the causal mask hides them.
    fill = ((0, 0), (0, -length % block))
    q_BTHK, k_BTGK, v_BTGK = (jnp.pad(x, (*fill, (0, 0), (0, 0))) for x in (q_BTHK, k_BTGK, v_BTGK))
    if documents_BT is not None:
        documents_BT = jnp.pad(documents_BT, fill, mode="edge")
    q_BGRTK = q_BTHK.reshape(batch, -1, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    o_BGRTK = _flash_attention(q_BGRTK, k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2), documents_BT, block)
    return o_BGRTK.transpose(0, 3, 1, 2, 4).reshape(q_BTHK.shape)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash_attention(q_BGRTK, k_BGTK, v_BGTK, documents_BT, block):
    o_BGRTK, _ = _forward(q_BGRTK, k_BGTK, v_BGTK, documents_BT, block)
    return o_BGRTK


def _forward(q_BGRTK, k_BGTK, v_BGTK, documents_BT, block):
    dtype = q_BGRTK.dtype
    scale = 1 / math.sqrt(q_BGRTK.shape[-1])
    key_blocks_N = _visible_key_blocks(documents_BT, k_BGTK.shape[2], block)

    def query_block(_, key_blocks):
        i = key_blocks.last
        q_BGRCK = _load(q_BGRTK, i, block)

        def key_block(j, carry, mask_BCC):
            max_BGRC1, sum_BGRC1, o_BGRCK = carry
            k_BGCK, v_BGCK = _load(k_BGTK, j, block), _load(v_BGTK, j, block)
            scores_BGRCC = scale * _einsum("bgrik,bgjk->bgrij", q_BGRCK, k_BGCK)
            # Finite, so that a row without any key in this block has no inf - inf. The weights of 1 it gets vanish
            # when a later block, its own at the latest, raises the maximum.
            scores_BGRCC = _where(mask_BCC, scores_BGRCC, -1e30)
            new_max_BGRC1 = jnp.maximum(max_BGRC1, scores_BGRCC.max(-1, keepdims=True))
            weights_BGRCC = jnp.exp(scores_BGRCC - new_max_BGRC1)
            shrink_BGRC1 = jnp.exp(max_BGRC1 - new_max_BGRC1)
            sum_BGRC1 = shrink_BGRC1 * sum_BGRC1 + weights_BGRCC.sum(-1, keepdims=True)
            o_BGRCK = shrink_BGRC1 * o_BGRCK + _einsum("bgrij,bgjk->bgrik", weights_BGRCC.astype(dtype), v_BGCK)
            return new_max_BGRC1, sum_BGRC1, o_BGRCK

        o_BGRCK = _zeros(q_BGRCK)
        carry = (o_BGRCK[..., :1] - 1e30, o_BGRCK[..., :1], o_BGRCK)
        max_BGRC1, sum_BGRC1, o_BGRCK = _visit_key_blocks(key_block, carry, key_blocks, documents_BT, block)
        return None, ((o_BGRCK / sum_BGRC1).astype(dtype), max_BGRC1 + jnp.log(sum_BGRC1))

    _, (o_NBGRCK, lse_NBGRC1) = lax.scan(query_block, None, key_blocks_N)
    o_BGRTK = _join_blocks(o_NBGRCK)
    return o_BGRTK, (q_BGRTK, k_BGTK, v_BGTK, documents_BT, o_BGRTK, _join_blocks(lse_NBGRC1))


def _backward(block, residuals, do_BGRTK):
    q_BGRTK, k_BGTK, v_BGTK, documents_BT, o_BGRTK, lse_BGRT1 = residuals
    dtype, sum_dtype = q_BGRTK.dtype, lse_BGRT1.dtype
    scale = 1 / math.sqrt(q_BGRTK.shape[-1])
    key_blocks_N = _visible_key_blocks(documents_BT, k_BGTK.shape[2], block)
    delta_BGRT1 = (do_BGRTK.astype(sum_dtype) * o_BGRTK).sum(-1, keepdims=True)

    def query_block(carry, key_blocks):
        i = key_blocks.last
        q_BGRCK, do_BGRCK, lse_BGRC1, delta_BGRC1 = (
            _load(x, i, block) for x in (q_BGRTK, do_BGRTK, lse_BGRT1, delta_BGRT1)
        )

        def key_block(j, carry, mask_BCC):
            dq_BGRCK, dk_BGTK, dv_BGTK = carry
            k_BGCK, v_BGCK = _load(k_BGTK, j, block), _load(v_BGTK, j, block)
            scores_BGRCC = scale * _einsum("bgrik,bgjk->bgrij", q_BGRCK, k_BGCK)
            weights_BGRCC = _where(mask_BCC, jnp.exp(scores_BGRCC - lse_BGRC1), 0)
            d_weights_BGRCC = _einsum("bgrik,bgjk->bgrij", do_BGRCK, v_BGCK)
            d_scores_BGRCC = (weights_BGRCC * (d_weights_BGRCC - delta_BGRC1)).astype(dtype)
            dq_BGRCK += _einsum("bgrij,bgjk->bgrik", d_scores_BGRCC, k_BGCK)
            dk_BGCK = _einsum("bgrij,bgrik->bgjk", d_scores_BGRCC, q_BGRCK)
            dv_BGCK = _einsum("bgrij,bgrik->bgjk", weights_BGRCC.astype(dtype), do_BGRCK)
            return dq_BGRCK, _add(dk_BGTK, dk_BGCK, j, block), _add(dv_BGTK, dv_BGCK, j, block)

        carry = (_zeros(q_BGRCK), *carry)
        dq_BGRCK, *carry = _visit_key_blocks(key_block, carry, key_blocks, documents_BT, block)
        return tuple(carry), (scale * dq_BGRCK).astype(dtype)

    carry = (_zeros(k_BGTK), _zeros(v_BGTK))
    (dk_BGTK, dv_BGTK), dq_NBGRCK = lax.scan(query_block, carry, key_blocks_N)
    return _join_blocks(dq_NBGRCK), (scale * dk_BGTK).astype(dtype), dv_BGTK.astype(dtype), None


_flash_attention.defvjp(_forward, _backward)


class KeyBlocks(NamedTuple):
    """For a block of queries, which blocks of keys hold any that they see.

    The queries of every row see all keys of the blocks from `whole` up to `last`, their own, of which they see the
    lower triangle; of those from `first` up to `whole`, some query does not see some key.
    """

    first: jax.Array
    whole: jax.Array
    last: jax.Array


def _visible_key_blocks(documents_BT: jax.Array | None, length: int, block: int) -> KeyBlocks:
    """The blocks of keys for each block of queries [N]."""
    last_N = jnp.arange(length // block, dtype=jnp.int32)
    if documents_BT is None:
        return KeyBlocks(jnp.zeros_like(last_N), jnp.zeros_like(last_N), last_N)
    border_BT = jnp.pad(documents_BT[:, 1:] != documents_BT[:, :-1], ((0, 0), (1, 0)))
    document_start_BT = lax.cummax(jnp.where(border_BT, jnp.arange(length, dtype=jnp.int32), 0), axis=1)
    earliest_N = document_start_BT[:, ::block].min(0)
    latest_N = document_start_BT[:, block - 1 :: block].max(0)
    return KeyBlocks(earliest_N // block, jnp.minimum((latest_N + block - 1) // block, last_N), last_N)


def _visit_key_blocks(key_block, carry, key_blocks: KeyBlocks, documents_BT, block):
    """key_block(j, carry, mask) for j = first..last; the mask [B, C, C] is None where every query sees every key."""
    first, whole, i = key_blocks
    mask_BCC = jnp.tril(jnp.ones((1, block, block), bool))
    if documents_BT is not None:

        def same_document(j):
            query_document_BC, key_document_BC = (
                lax.dynamic_slice_in_dim(documents_BT, n * block, block, 1) for n in (i, j)
            )
            return query_document_BC[:, :, None] == key_document_BC[:, None, :]

        carry = lax.fori_loop(first, whole, lambda j, carry: key_block(j, carry, same_document(j)), carry)
        mask_BCC &= same_document(i)
    carry = lax.fori_loop(whole, i, lambda j, carry: key_block(j, carry, None), carry)
    return key_block(i, carry, mask_BCC)


def _where(mask_BCC: jax.Array | None, x_BGRCC: jax.Array, otherwise: float) -> jax.Array:
    return x_BGRCC if mask_BCC is None else jnp.where(mask_BCC[:, None, None], x_BGRCC, otherwise)


def _sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _zeros(x: jax.Array) -> jax.Array:
    return vary_like(jnp.zeros(x.shape, _sum_dtype(x.dtype)), x)


def _einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # The default precision of an accelerator multiplies fp32 operands in bf16 or TF32.
    precision = lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=_sum_dtype(x.dtype))


def _load(x: jax.Array, n: jax.Array, block: int) -> jax.Array:
    """Block n of the next to last axis."""
    return lax.dynamic_slice_in_dim(x, n * block, block, axis=-2)


def _add(x: jax.Array, y: jax.Array, n: jax.Array, block: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, _load(x, n, block) + y, n * block, axis=-2)


def _join_blocks(x_NBGRCK: jax.Array) -> jax.Array:
    blocks, batch, groups, ratio, block, dim = x_NBGRCK.shape
    return jnp.moveaxis(x_NBGRCK, 0, 3).reshape(batch, groups, ratio, blocks * block, dim)


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
