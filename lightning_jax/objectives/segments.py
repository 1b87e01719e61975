"""From tokens to the documents of a row: sums by segment, and the pairs that neighbouring segments make.

What belongs to segment s of a row stands in column s - 1, so that any number of documents fits: there are no more of
them in a row than it has tokens.

Shapes: B batch, T sequence, P = T // 2 places for pairs.
"""

import jax
import jax.numpy as jnp


def segment_sums(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The sum [B, T] of each segment's values; 0 for columns without a segment, and padding counts nowhere."""
    T = values_BT.shape[1]
    sums = jax.vmap(lambda values_T, ids_T: jax.ops.segment_sum(values_T, ids_T, num_segments=T + 1))
    return sums(values_BT, segment_ids_BT)[:, 1:]


def of_tokens(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Every token's own segment's value [B, T], the inverse of `segment_sums`; the first segment's for padding."""
    return jnp.take_along_axis(values_BT, jnp.maximum(segment_ids_BT - 1, 0), axis=1)


def last_tokens(segment_ids_BT: jax.Array) -> jax.Array:
    """Whether a token is the last of its segment, bool [B, T]: by place, whatever token it is."""
    following_BT = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
    return (segment_ids_BT > 0) & (segment_ids_BT != following_BT)


def pairs(values_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of values by segment those of the first and of the second of each pair, [B, P] each."""
    P = values_BT.shape[1] // 2
    values_BP2 = values_BT[:, : 2 * P].reshape(-1, P, 2)
    return values_BP2[..., 0], values_BP2[..., 1]
