"""Softmax attention of a sequence that is split over devices: keys and values travel, in turns or all at once.

Causal attention would give the device with a row's end all the work and the one with its beginning none. So a row is
cut into two pieces for each of W devices, and for the attention device d takes the pieces d and 2W - 1 - d: in each
turn of the ring every device has the same work, half its queries times all keys of a turn or the reverse. Outside of
it rows stay in their order, which is what lightning layers need.

"ring" holds the keys and values of two devices at a time and sends them in W - 1 turns, which overlap with the work;
"all_gather" holds those of the whole sequence, one collective: faster while they are small.

Sources: Ring Attention (arXiv 2310.01889); the balanced order: Llama 3 (arXiv 2407.21783) section 3.3.2, which also
gathers keys and values.
Shapes: B batch, T tokens of one device, H query heads, G key/value heads, R = H / G, K head dim, W devices along
the sequence.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax.models.blocked_attention import (
    attend,
    attend_backward,
    blocked_attention,
    default_block,
    group_heads,
    join_heads,
)
from lightning_jax.parallel.config import SequenceAttention
from pallas_kernels.sequence_parallel import count_documents


def sequence_parallel_softmax_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    axis_name: str,
    segment_ids_BT: jax.Array | None,
    method: SequenceAttention,
) -> jax.Array:
    """`softmax_attention` inside `jax.shard_map`, of a sequence in equal pieces along the mesh axis `axis_name`.

    Args:
        q_BTHK, k_BTGK, v_BTGK, segment_ids_BT: of this device's tokens, T even; documents may go on over any number of
            devices.

    Returns:
        o_BTHK of this device's tokens.
    """
    documents_BT = None if segment_ids_BT is None else _number_documents(segment_ids_BT, axis_name)
    batch, length, heads, _ = q_BTHK.shape
    half = length // 2
    block = next(size for size in range(default_block(batch, half, heads), 0, -1) if half % size == 0)
    if method == "ring":
        balanced = [_balance(x, axis_name) for x in (q_BTHK, k_BTGK, v_BTGK)]
        documents_BT = None if documents_BT is None else _balance(documents_BT, axis_name)
        return _restore(_ring(*balanced, documents_BT, axis_name, block), axis_name)
    k_BSGK, v_BSGK = (lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (k_BTGK, v_BTGK))
    key_documents_BS = query_documents_BT = None
    if documents_BT is not None:
        key_documents_BS = lax.all_gather(documents_BT, axis_name, axis=1, tiled=True)
        query_documents_BT = _balance(documents_BT, axis_name)
    q_BTHK = _balance(q_BTHK, axis_name)
    device, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    parts = []
    for part, piece in ((slice(0, half), device), (slice(half, None), 2 * devices - 1 - device)):
        part_documents = None if query_documents_BT is None else query_documents_BT[:, part]
        first_query = piece * (half // block)
        parts.append(
            blocked_attention(q_BTHK[:, part], k_BSGK, v_BSGK, part_documents, key_documents_BS, first_query, block)
        )
    return _restore(jnp.concatenate(parts, axis=1), axis_name)


def _number_documents(segment_ids_BT: jax.Array, axis_name: str) -> jax.Array:
    """The number of each token's document, counted along the whole row."""
    first_B = count_documents(segment_ids_BT, axis_name).first_WB[lax.axis_index(axis_name)]
    border_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return first_B[:, None] + jnp.pad(jnp.cumsum(border_BT, axis=1, dtype=first_B.dtype), ((0, 0), (1, 0)))


# A device holds the pieces 2d and 2d + 1 of its rows, one of them even, one odd; balanced, it holds d and 2W - 1 - d,
# again one of each. So the even pieces change places among themselves, and so do the odd ones.


def _owners(axis_name: str, odd: int) -> list[tuple[int, int]]:
    """(device that holds an even or odd piece, device that works on it), for each device."""
    devices = lax.axis_size(axis_name)
    return [(d, min(2 * d + odd, 2 * devices - 1 - 2 * d - odd)) for d in range(devices)]


def _balance(x_BT: jax.Array, axis_name: str) -> jax.Array:
    """From the tokens that this device holds to those it works on, both in order; any number of axes behind T."""
    even, odd = (
        lax.ppermute(piece, axis_name, _owners(axis_name, parity))
        for parity, piece in enumerate(jnp.split(x_BT, 2, axis=1))
    )
    even_first = lax.axis_index(axis_name) % 2 == 0
    return jnp.concatenate([jnp.where(even_first, even, odd), jnp.where(even_first, odd, even)], axis=1)


def _restore(x_BT: jax.Array, axis_name: str) -> jax.Array:
    """The inverse of `_balance`."""
    early, late = jnp.split(x_BT, 2, axis=1)
    even_first = lax.axis_index(axis_name) % 2 == 0
    pieces = (jnp.where(even_first, early, late), jnp.where(even_first, late, early))
    return jnp.concatenate(
        [
            lax.ppermute(piece, axis_name, [(to, source) for source, to in _owners(axis_name, parity)])
            for parity, piece in enumerate(pieces)
        ],
        axis=1,
    )


def _ring(q_BTHK, k_BTGK, v_BTGK, documents_BT, axis_name, block):
    """Attention of balanced pieces."""
    groups = k_BTGK.shape[2]
    keys_values = (k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2))
    return join_heads(_ring_attention(group_heads(q_BTHK, groups), *keys_values, documents_BT, axis_name, block))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ring_attention(q_BGRTK, k_BGTK, v_BGTK, documents_BT, axis_name, block):
    return _ring_forward(q_BGRTK, k_BGTK, v_BGTK, documents_BT, axis_name, block)[0]


def _ring_forward(q_BGRTK, k_BGTK, v_BGTK, documents_BT, axis_name, block):
    sums = jnp.promote_types(q_BGRTK.dtype, jnp.float32)
    own = (k_BGTK, v_BGTK, documents_BT)
    # Its own pieces first: every query sees its own key, so that what it does not see later weighs nothing.
    partial_sums = attend(q_BGRTK, k_BGTK, v_BGTK, documents_BT, documents_BT, 0, block, dtype=sums)

    def turn(carry, step):
        travelling, partial_sums = carry
        k_BGTK, v_BGTK, key_documents_BT = travelling = _pass_on(travelling, axis_name)

        def keys_before(partial_sums):
            k, v, documents = _early(k_BGTK), _early(v_BGTK), _early(key_documents_BT, 1)
            return _combine(partial_sums, attend(q_BGRTK, k, v, documents_BT, documents, None, block, dtype=sums))

        def keys_between(partial_sums):
            q, documents = _late(q_BGRTK), _late(documents_BT, 1)
            new = attend(q, k_BGTK, v_BGTK, documents, key_documents_BT, None, block, dtype=sums)
            late = _combine(tuple(map(_late, partial_sums)), new)
            return tuple(jnp.concatenate([_early(x), y], axis=-2) for x, y in zip(partial_sums, late, strict=True))

        earlier = step <= lax.axis_index(axis_name)  # the device whose keys have come
        return (travelling, lax.cond(earlier, keys_before, keys_between, partial_sums)), None

    steps = jnp.arange(1, lax.axis_size(axis_name))
    ((_, (o_BGRTK, lse_BGRT1)), _) = lax.scan(turn, (own, partial_sums), steps)
    o_BGRTK = o_BGRTK.astype(q_BGRTK.dtype)
    return o_BGRTK, (q_BGRTK, *own, o_BGRTK, lse_BGRT1)


def _ring_backward(axis_name, block, residuals, do_BGRTK):
    q_BGRTK, k_BGTK, v_BGTK, documents_BT, o_BGRTK, lse_BGRT1 = residuals
    delta_BGRT1 = (do_BGRTK.astype(lse_BGRT1.dtype) * o_BGRTK).sum(-1, keepdims=True)
    of_queries = (do_BGRTK, lse_BGRT1, delta_BGRT1)
    own = (k_BGTK, v_BGTK, documents_BT)
    dq_BGRTK, *d_own = attend_backward(q_BGRTK, k_BGTK, v_BGTK, documents_BT, documents_BT, 0, block, *of_queries)

    def turn(carry, step):
        travelling, dq_BGRTK = carry
        (k_BGTK, v_BGTK, key_documents_BT), d_keys = travelling = _pass_on(travelling, axis_name)

        def keys_before(dq_BGRTK, d_keys):
            k, v, documents = _early(k_BGTK), _early(v_BGTK), _early(key_documents_BT, 1)
            dq, *early = attend_backward(q_BGRTK, k, v, documents_BT, documents, None, block, *of_queries)
            joined = [jnp.concatenate([_early(x) + y, _late(x)], -2) for x, y in zip(d_keys, early, strict=True)]
            return dq_BGRTK + dq, joined

        def keys_between(dq_BGRTK, d_keys):
            q, documents = _late(q_BGRTK), _late(documents_BT, 1)
            late_queries = tuple(map(_late, of_queries))
            dq, *new = attend_backward(q, k_BGTK, v_BGTK, documents, key_documents_BT, None, block, *late_queries)
            dq_BGRTK = jnp.concatenate([_early(dq_BGRTK), _late(dq_BGRTK) + dq], -2)
            return dq_BGRTK, [x + y for x, y in zip(d_keys, new, strict=True)]

        earlier = step <= lax.axis_index(axis_name)
        dq_BGRTK, d_keys = lax.cond(earlier, keys_before, keys_between, dq_BGRTK, d_keys)
        return ((travelling[0], d_keys), dq_BGRTK), None

    steps = jnp.arange(1, lax.axis_size(axis_name))
    (((_, d_keys), dq_BGRTK), _) = lax.scan(turn, ((own, d_own), dq_BGRTK), steps)
    dk_BGTK, dv_BGTK = _pass_on(d_keys, axis_name)  # home
    dtype = q_BGRTK.dtype
    return dq_BGRTK.astype(dtype), dk_BGTK.astype(dtype), dv_BGTK.astype(dtype), None


_ring_attention.defvjp(_ring_forward, _ring_backward)


def _pass_on(tree, axis_name):
    devices = lax.axis_size(axis_name)
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, [(d, (d + 1) % devices) for d in range(devices)]), tree)


def _combine(partial_sums, more):
    """Softmax over two sets of keys from the softmax over each."""
    (o_BGRTK, lse_BGRT1), (more_BGRTK, more_lse_BGRT1) = partial_sums, more
    both_BGRT1 = jnp.logaddexp(lse_BGRT1, more_lse_BGRT1)
    weighted = jnp.exp(lse_BGRT1 - both_BGRT1) * o_BGRTK + jnp.exp(more_lse_BGRT1 - both_BGRT1) * more_BGRTK
    return weighted, both_BGRT1


def _early(x: jax.Array | None, axis: int = -2) -> jax.Array | None:
    return None if x is None else jnp.split(x, 2, axis)[0]


def _late(x: jax.Array | None, axis: int = -2) -> jax.Array | None:
    return None if x is None else jnp.split(x, 2, axis)[1]
