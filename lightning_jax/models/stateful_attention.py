"""Attention of new tokens to all that came before them, which a state remembers: T of them in a piece, or one.

A lightning layer remembers its sum of decayed key-value products, of one size for ever; a softmax layer remembers every
key and value, each at the place of its token in the sequence, so that rows of any lengths share a batch.

Sources: MiniMax-01 (arXiv 2501.08313) section 2.2 for the recurrence; online softmax over blocks of keys:
FlashAttention-2 (arXiv 2307.08691) section 3.1.

Shapes: L layers that share an array, B batch, T new tokens, S places of the cache, C places of a block, H query heads,
G key/value heads, R = H / G query heads that share one, K head dim, M = R * T queries of a key/value head.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import lightning_attention_step

LEAST, MOST = 64, 256  # places of the cache that are read at one time: a block, of a power of two


class KeyValues(NamedTuple):
    """The cache of softmax layers, in the compute dtype; place s holds the token at position s of its sequence."""

    k_LBGSK: jax.Array
    v_LBGSK: jax.Array


def places(capacity: int) -> int:
    """The size S of a cache that holds `capacity` tokens: whole blocks, small ones where it is small itself."""
    block = MOST if capacity > 4 * MOST else LEAST
    return -(-capacity // block) * block


def _block(cache_LBGSK: jax.Array) -> int:
    """The size C of a block, which divides S."""
    _, batch, groups, size, dim = cache_LBGSK.shape
    most = MOST
    if jax.default_backend() == "cpu":
        # What is copied out of the cache for a product should stay near the core, and a short row need not read a
        # long block; below LEAST the loop costs more than it saves.
        most = min(MOST, max(LEAST, 2**17 // (batch * groups * dim)))
    return math.gcd(size, 1 << (most.bit_length() - 1))


def lightning_attention_from(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    log_decay_H: jax.Array,
    state_BHKK: jax.Array,
    *,
    lightning_attention: Callable[..., tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """o_t = S_t^T q_t with S_t = exp(log_decay) S_{t-1} + k_t v_t^T, from the state before the first token.

    Args:
        k_BTHK: keys; those of padding are 0 and add nothing, and a state that is 0 stays exactly 0 through them.
        state_BHKK: at least fp32, as are all sums.
        lightning_attention: the operator for more than one token; a single one needs no chunks.

    Returns:
        o [B, T, H, K] in v's dtype, and the state after the last token.
    """
    if q_BTHK.shape[1] > 1:
        return lightning_attention(
            q_BTHK, k_BTHK, v_BTHK, log_decay_H, initial_state=state_BHKK, return_final_state=True
        )
    o_BHK, state_BHKK = lightning_attention_step(q_BTHK[:, 0], k_BTHK[:, 0], v_BTHK[:, 0], log_decay_H, state_BHKK)
    return o_BHK[:, None], state_BHKK


def cached_softmax_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    cache: KeyValues,
    layer: jax.Array,
    positions_BT: jax.Array,
) -> tuple[jax.Array, KeyValues]:
    """Puts the new keys and values into the cache, then attends to all places up to each query's own.

    The work follows the longest row that there is, not the capacity: blocks behind it are not read.

    Args:
        cache: of several layers; only the new places of one are written, so that it is updated in place.
        layer: which.
        positions_BT: of the new tokens in their sequences, below S; -1 for padding, which is not remembered and whose
            output is finite and means nothing.

    Returns:
        o [B, T, H, K] in v's dtype, and the cache. The softmax is at least fp32.
    """
    rows_B1 = jnp.arange(q_BTHK.shape[0])[:, None]
    num_places = cache.k_LBGSK.shape[3]
    place_BT = jnp.where(positions_BT < 0, num_places, positions_BT)  # out of range: dropped

    def remember(cache_LBGSK: jax.Array, new_BTGK: jax.Array) -> jax.Array:
        return cache_LBGSK.at[layer, rows_B1, :, place_BT].set(new_BTGK.astype(cache_LBGSK.dtype), mode="drop")

    cache = KeyValues(remember(cache.k_LBGSK, k_BTGK), remember(cache.v_LBGSK, v_BTGK))
    return _attend(q_BTHK, cache, layer, positions_BT), cache


def _attend(q_BTHK: jax.Array, cache: KeyValues, layer: jax.Array, positions_BT: jax.Array) -> jax.Array:
    (batch, length, heads, dim), groups = q_BTHK.shape, cache.k_LBGSK.shape[2]
    block = _block(cache.k_LBGSK)
    # The queries that share a key/value head are rows of one product, so that no key is repeated.
    q_BGMK = q_BTHK.reshape(batch, length, groups, -1, dim).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, dim)
    position_BM = jnp.tile(positions_BT, (1, heads // groups))
    # Every query sees place 0, padding too: a sum over no place at all would be 0 / 0.
    position_B1M1 = jnp.maximum(position_BM, 0)[:, None, :, None]

    def load(cache_LBGSK: jax.Array, start: jax.Array) -> jax.Array:
        sizes = (1, batch, groups, block, dim)
        return jax.lax.dynamic_slice(cache_LBGSK, (layer, 0, 0, start, 0), sizes)[0]

    def one_block(n: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        max_BGM1, sum_BGM1, o_BGMK = carry
        start = n * block
        k_BGCK, v_BGCK = load(cache.k_LBGSK, start), load(cache.v_LBGSK, start)
        scores_BGMC = _einsum("bgmk,bgck->bgmc", q_BGMK, k_BGCK) / math.sqrt(dim)
        # Finite, so that a block without any visible place has no inf - inf; the first block always has one.
        scores_BGMC = jnp.where(start + jnp.arange(block) <= position_B1M1, scores_BGMC, -1e30)
        new_max_BGM1 = jnp.maximum(max_BGM1, scores_BGMC.max(-1, keepdims=True))
        weights_BGMC = jnp.exp(scores_BGMC - new_max_BGM1)
        shrink_BGM1 = jnp.exp(max_BGM1 - new_max_BGM1)
        sum_BGM1 = shrink_BGM1 * sum_BGM1 + weights_BGMC.sum(-1, keepdims=True)
        o_BGMK = shrink_BGM1 * o_BGMK + _einsum("bgmc,bgck->bgmk", weights_BGMC.astype(v_BGCK.dtype), v_BGCK)
        return new_max_BGM1, sum_BGM1, o_BGMK

    o_BGMK = jnp.zeros(q_BGMK.shape, jnp.promote_types(q_BTHK.dtype, jnp.float32))
    carry = (o_BGMK[..., :1] - 1e30, o_BGMK[..., :1], o_BGMK)
    num_blocks = jnp.max(positions_BT) // block + 1
    _, sum_BGM1, o_BGMK = jax.lax.fori_loop(0, num_blocks, one_block, carry)
    # Where all rows are padding there was no block.
    o_BGMK = (o_BGMK / jnp.maximum(sum_BGM1, 1e-30)).astype(cache.v_LBGSK.dtype)
    o_BGRTK = o_BGMK.reshape(batch, groups, -1, length, dim)
    return o_BGRTK.transpose(0, 3, 1, 2, 4).reshape(q_BTHK.shape)


def _einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # The default precision of an accelerator multiplies fp32 operands in bf16 or TF32.
    precision = jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=wide)
