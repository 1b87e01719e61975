"""Lightning attention of a sequence that is split over devices: one all-gather of states, whatever its length.

Source: LASP-2 (arXiv 2502.07563) algorithms 1 and 2, with the decay of MiniMax-01 (arXiv 2501.08313) and documents.
Shapes: B batch, T tokens of one device, H heads, K key dim, V value dim, W devices along the sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Implementation, lightning_attention


def sequence_parallel_lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    axis_name: str,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    implementation: Implementation = "auto",
    chunk_size: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`lightning_attention` inside `jax.shard_map`, of a sequence in equal pieces along the mesh axis `axis_name`.

    Each device sums up its own keys and values, and receives the sums of all; those of the devices before it, decayed,
    are the state that enters its piece. The backward sends the sums' gradients back in one reduce-scatter. Documents
    gather three integers per row and device as well, and the final state takes one all-reduce more.

    Args:
      q, k, v, log_decay, implementation, chunk_size: as in `lightning_attention`, T the tokens of this device.
      axis_name: mesh axis; the devices hold their pieces of the sequence in its order.
      segment_ids: [B, T], of this device's tokens; a document may go on over any number of devices.
      initial_state: [B, H, K, V], the same on all devices: of the document of the whole sequence's first token.
      return_final_state: whether to return the state behind the whole sequence, on every device.

    Returns:
      o [B, T, H, V] of this device's tokens, or (o, final_state), as `lightning_attention` of the whole sequence gives
      them. Differentiable in q, k, v and initial_state.
    """
    shard, shards = lax.axis_index(axis_name), lax.axis_size(axis_name)
    length = q.shape[1]
    log_decay = lax.stop_gradient(jnp.asarray(log_decay, jnp.promote_types(q.dtype, jnp.float32)))
    states_WBHKV = lax.all_gather(_added_state(k, v, log_decay, segment_ids), axis_name)
    # Of a state behind device w that enters this device: the tokens between, and whether all are of one document.
    tokens_W = length * (shard - 1 - jnp.arange(shards))
    reaches_WB = (tokens_W >= 0)[:, None]
    if segment_ids is not None:
        documents = count_documents(segment_ids, axis_name)
        reaches_WB &= documents.last_WB == documents.first_WB[shard]
    weight_WBH = jnp.where(reaches_WB[..., None], jnp.exp(jnp.maximum(tokens_W, 0)[:, None, None] * log_decay), 0)
    entering_BHKV = (weight_WBH[..., None, None] * states_WBHKV).sum(0)
    if initial_state is not None:
        weight_1H = jnp.exp(length * shard * log_decay)[None]
        if segment_ids is not None:
            weight_1H = jnp.where(documents.first_WB[shard][:, None] == 0, weight_1H, 0)
        entering_BHKV += weight_1H[..., None, None] * initial_state
    o, final_state = lightning_attention(
        q,
        k,
        v,
        log_decay,
        segment_ids=segment_ids,
        initial_state=entering_BHKV,
        return_final_state=True,
        implementation=implementation,
        chunk_size=chunk_size,
    )
    if not return_final_state:
        return o
    return o, lax.psum(jnp.where(shard == shards - 1, final_state, 0), axis_name)


def _added_state(k_BTHK, v_BTHV, log_decay_H, segment_ids_BT):
    """[B, H, K, V]: what this device's tokens add to the state, Σ_t λ^(T-1-t) k_t v_tᵀ over its last document."""
    length = k_BTHK.shape[1]
    weight_BTH1 = jnp.exp(jnp.arange(length - 1, -1, -1)[:, None] * log_decay_H)[None, :, :, None]
    if segment_ids_BT is not None:
        changes_BS = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
        borders_behind_BT = jnp.cumsum(jnp.pad(changes_BS, ((0, 0), (0, 1)))[:, ::-1], axis=1)[:, ::-1]
        weight_BTH1 = jnp.where(borders_behind_BT[:, :, None, None] == 0, weight_BTH1, 0)
    return jnp.einsum(
        "bthk,bthv->bhkv",
        (weight_BTH1 * k_BTHK).astype(k_BTHK.dtype),
        v_BTHV,
        precision=lax.Precision.DEFAULT if k_BTHK.dtype == jnp.bfloat16 else lax.Precision.HIGHEST,
        preferred_element_type=log_decay_H.dtype,
    )


class Documents(NamedTuple):
    """The documents of the whole sequence, numbered 0, 1, ... along it."""

    first_WB: jax.Array  # of the first token of each device
    last_WB: jax.Array  # of the last


def count_documents(segment_ids_BT: jax.Array, axis_name: str) -> Documents:
    """The documents of a sequence in equal pieces along the mesh axis `axis_name`, from the ids of this device's."""
    borders_B = (segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]).sum(1, dtype=segment_ids_BT.dtype)
    ends_B3 = jnp.stack([segment_ids_BT[:, 0], segment_ids_BT[:, -1], borders_B], axis=-1)
    first_WB, last_WB, borders_WB = jnp.moveaxis(lax.all_gather(ends_B3, axis_name), -1, 0)
    begins_WB = jnp.pad(first_WB[1:] != last_WB[:-1], ((1, 0), (0, 0)))
    document_WB = jnp.cumsum(begins_WB + borders_WB, axis=0)
    return Documents(document_WB - borders_WB, document_WB)
