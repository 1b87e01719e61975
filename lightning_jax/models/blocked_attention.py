"""Softmax attention of queries to keys in blocks, linear in the sequence in memory, in plain XLA on any platform.

The queries may be a part of the sequence and the keys another, so that a sequence that is split over devices is
attended to part by part, and the parts combined by the logarithms of their softmax denominators.

Source: FlashAttention-2 (arXiv 2307.08691) section 3.1.
Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G query heads that share one, K head dim,
C tokens of a block (i, j its queries and keys), N blocks of queries.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.varying import vary_like

UNSEEN = -1e30  # a score that weighs nothing; finite, so that a query without any key in a block has no inf - inf


def default_block(batch: int, length: int, heads: int) -> int:
    """Tokens of a block that suit the platform."""
    if jax.default_backend() != "cpu":
        return min(512, length)
    # The scores of one pair of blocks, B·H·C² fp32, should stay in a MB of cache; and a sequence of fewer than
    # four blocks computes mostly scores that the causal mask then discards. Measured for B·H from 4 to 64.
    cached = math.isqrt(2**18 // (batch * heads))
    return min(next((size for size in (512, 256, 128) if size <= cached and 4 * size <= length), 64), length)


def blocked_attention(q_BTHK, k_BSGK, v_BSGK, query_documents_BT, key_documents_BS, first_query, block):
    """o_BTHK of queries, each of which sees the keys of its document up to its own place.

    Args:
        query_documents_BT, key_documents_BS: the numbers of the documents, which rise along the sequence, or both None.
        first_query: the place among the keys of the first query, in blocks; may be traced.
        block: tokens of a block; divides T and S.
    """
    q_BGRTK = group_heads(q_BTHK, k_BSGK.shape[2])
    k_BGSK, v_BGSK = k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)
    return join_heads(_attention(q_BGRTK, k_BGSK, v_BGSK, query_documents_BT, key_documents_BS, first_query, block))


def group_heads(x_BTHK: jax.Array, groups: int) -> jax.Array:
    """x_BGRTK."""
    batch, length, heads, dim = x_BTHK.shape
    return x_BTHK.reshape(batch, length, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)


def join_heads(x_BGRTK: jax.Array) -> jax.Array:
    """x_BTHK."""
    batch, groups, ratio, length, dim = x_BGRTK.shape
    return x_BGRTK.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * ratio, dim)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q_BGRTK, k_BGSK, v_BGSK, query_documents_BT, key_documents_BS, first_query, block):
    return _attention_forward(q_BGRTK, k_BGSK, v_BGSK, query_documents_BT, key_documents_BS, first_query, block)[0]


def _attention_forward(q_BGRTK, k_BGSK, v_BGSK, query_documents_BT, key_documents_BS, first_query, block):
    inputs = (q_BGRTK, k_BGSK, v_BGSK, query_documents_BT, key_documents_BS)
    o_BGRTK, lse_BGRT1 = attend(*inputs, first_query, block, dtype=q_BGRTK.dtype)
    return o_BGRTK, (inputs, first_query, o_BGRTK, lse_BGRT1)


def _attention_backward(block, residuals, do_BGRTK):
    inputs, first_query, o_BGRTK, lse_BGRT1 = residuals
    delta_BGRT1 = (do_BGRTK.astype(lse_BGRT1.dtype) * o_BGRTK).sum(-1, keepdims=True)
    gradients = attend_backward(*inputs, first_query, block, do_BGRTK, lse_BGRT1, delta_BGRT1)
    return *(gradient.astype(x.dtype) for gradient, x in zip(gradients, inputs, strict=False)), None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def attend(q_BGRTK, k_BGSK, v_BGSK, query_documents_BT, key_documents_BS, first_query, block, *, dtype):
    """What the keys here give to queries: o_BGRTK in `dtype`, and the logarithms lse_BGRT1 of its denominators.

    Where a query sees none of the keys, lse is about UNSEEN and o finite.

    Args:
        first_query: as in `blocked_attention`, or None: all keys lie before all queries.
    """
    scale = 1 / math.sqrt(q_BGRTK.shape[-1])
    key_blocks_N = _visible_key_blocks(query_documents_BT, key_documents_BS, q_BGRTK, k_BGSK, first_query, block)

    def query_block(_, key_blocks):
        q_BGRCK = _load(q_BGRTK, key_blocks.query, block)

        def key_block(j, carry, mask_BCC):
            max_BGRC1, sum_BGRC1, o_BGRCK = carry
            k_BGCK, v_BGCK = _load(k_BGSK, j, block), _load(v_BGSK, j, block)
            scores_BGRCC = scale * _einsum("bgrik,bgjk->bgrij", q_BGRCK, k_BGCK)
            # The weights of 1 that a query without any key in this block gets vanish when a later block, its own at
            # the latest, raises the maximum.
            scores_BGRCC = _where(mask_BCC, scores_BGRCC, UNSEEN)
            new_max_BGRC1 = jnp.maximum(max_BGRC1, scores_BGRCC.max(-1, keepdims=True))
            weights_BGRCC = jnp.exp(scores_BGRCC - new_max_BGRC1)
            shrink_BGRC1 = jnp.exp(max_BGRC1 - new_max_BGRC1)
            sum_BGRC1 = shrink_BGRC1 * sum_BGRC1 + weights_BGRCC.sum(-1, keepdims=True)
            o_BGRCK = shrink_BGRC1 * o_BGRCK + _einsum("bgrij,bgjk->bgrik", weights_BGRCC.astype(v_BGCK.dtype), v_BGCK)
            return new_max_BGRC1, sum_BGRC1, o_BGRCK

        o_BGRCK = _zeros(q_BGRCK)
        carry = (o_BGRCK[..., :1] + UNSEEN, o_BGRCK[..., :1], o_BGRCK)
        carry = _visit_key_blocks(
            key_block, carry, key_blocks, query_documents_BT, key_documents_BS, first_query, block
        )
        max_BGRC1, sum_BGRC1, o_BGRCK = carry
        if first_query is None:  # else every query has seen its own key
            sum_BGRC1 = jnp.where(sum_BGRC1 == 0, 1, sum_BGRC1)
        return None, ((o_BGRCK / sum_BGRC1).astype(dtype), max_BGRC1 + jnp.log(sum_BGRC1))

    _, (o_NBGRCK, lse_NBGRC1) = lax.scan(query_block, None, key_blocks_N)
    return _join_blocks(o_NBGRCK), _join_blocks(lse_NBGRC1)


def attend_backward(
    q_BGRTK, k_BGSK, v_BGSK, query_documents_BT, key_documents_BS, first_query, block, do_BGRTK, lse_BGRT1, delta_BGRT1
):
    """The gradients (dq, dk, dv) that pass through the keys here, in the dtype of `lse_BGRT1`.

    Args:
        lse_BGRT1: the logarithms of the softmax denominators over all keys of each query, here or elsewhere.
        delta_BGRT1: Σ_k do·o of the output over all keys.
    """
    dtype = q_BGRTK.dtype
    scale = 1 / math.sqrt(q_BGRTK.shape[-1])
    key_blocks_N = _visible_key_blocks(query_documents_BT, key_documents_BS, q_BGRTK, k_BGSK, first_query, block)

    def query_block(carry, key_blocks):
        q_BGRCK, do_BGRCK, lse_BGRC1, delta_BGRC1 = (
            _load(x, key_blocks.query, block) for x in (q_BGRTK, do_BGRTK, lse_BGRT1, delta_BGRT1)
        )

        def key_block(j, carry, mask_BCC):
            dq_BGRCK, dk_BGSK, dv_BGSK = carry
            k_BGCK, v_BGCK = _load(k_BGSK, j, block), _load(v_BGSK, j, block)
            scores_BGRCC = scale * _einsum("bgrik,bgjk->bgrij", q_BGRCK, k_BGCK)
            weights_BGRCC = _where(mask_BCC, jnp.exp(scores_BGRCC - lse_BGRC1), 0)
            d_weights_BGRCC = _einsum("bgrik,bgjk->bgrij", do_BGRCK, v_BGCK)
            d_scores_BGRCC = (weights_BGRCC * (d_weights_BGRCC - delta_BGRC1)).astype(dtype)
            dq_BGRCK += _einsum("bgrij,bgjk->bgrik", d_scores_BGRCC, k_BGCK)
            dk_BGCK = _einsum("bgrij,bgrik->bgjk", d_scores_BGRCC, q_BGRCK)
            dv_BGCK = _einsum("bgrij,bgrik->bgjk", weights_BGRCC.astype(dtype), do_BGRCK)
            return dq_BGRCK, _add(dk_BGSK, dk_BGCK, j, block), _add(dv_BGSK, dv_BGCK, j, block)

        carry = (_zeros(q_BGRCK), *carry)
        dq_BGRCK, *carry = _visit_key_blocks(
            key_block, carry, key_blocks, query_documents_BT, key_documents_BS, first_query, block
        )
        return tuple(carry), scale * dq_BGRCK

    carry = (_zeros(k_BGSK), _zeros(v_BGSK))
    (dk_BGSK, dv_BGSK), dq_NBGRCK = lax.scan(query_block, carry, key_blocks_N)
    return _join_blocks(dq_NBGRCK), scale * dk_BGSK, dv_BGSK


class KeyBlocks(NamedTuple):
    """For a block of queries, which blocks of keys before its own hold any that they see.

    The queries of every row see all keys of the blocks from `whole` up to `end`, not included; of those from `first` up
    to `whole`, some query does not see some key. Of their own block they see the lower triangle.
    """

    query: jax.Array
    first: jax.Array
    whole: jax.Array
    end: jax.Array


def _visible_key_blocks(query_documents_BT, key_documents_BS, q_BGRTK, k_BGSK, first_query, block) -> KeyBlocks:
    """The blocks of keys for each block of queries [N]."""
    query_N = jnp.arange(q_BGRTK.shape[-2] // block, dtype=jnp.int32)
    end_N = jnp.full_like(query_N, k_BGSK.shape[-2] // block) if first_query is None else first_query + query_N
    if query_documents_BT is None:
        return KeyBlocks(query_N, jnp.zeros_like(query_N), jnp.zeros_like(query_N), end_N)
    document_start_BT = jax.vmap(jnp.searchsorted)(key_documents_BS, query_documents_BT).astype(jnp.int32)
    earliest_N = document_start_BT[:, ::block].min(0)
    latest_N = document_start_BT[:, block - 1 :: block].max(0)
    first_N, whole_N = earliest_N // block, (latest_N + block - 1) // block
    return KeyBlocks(query_N, first_N, jnp.minimum(whole_N, end_N), end_N)


def _visit_key_blocks(
    key_block, carry, key_blocks: KeyBlocks, query_documents_BT, key_documents_BS, first_query, block
):
    """key_block(j, carry, mask) for each j; the mask [B, C, C] is None where every query sees every key."""
    query, first, whole, end = key_blocks
    mask_BCC = jnp.tril(jnp.ones((1, block, block), bool))
    if query_documents_BT is not None:

        def same_document(j):
            query_document_BC = lax.dynamic_slice_in_dim(query_documents_BT, query * block, block, 1)
            key_document_BC = lax.dynamic_slice_in_dim(key_documents_BS, j * block, block, 1)
            return query_document_BC[:, :, None] == key_document_BC[:, None, :]

        carry = lax.fori_loop(first, whole, lambda j, carry: key_block(j, carry, same_document(j)), carry)
    carry = lax.fori_loop(whole, end, lambda j, carry: key_block(j, carry, None), carry)
    if first_query is None:
        return carry
    if query_documents_BT is not None:
        mask_BCC &= same_document(end)
    return key_block(end, carry, mask_BCC)


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
