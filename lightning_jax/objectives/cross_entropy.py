"""Cross-entropy of a large vocabulary, a chunk of each sequence at a time: logits [B, T, V] never exist.

The gradient is taken in the same pass as the loss, while a chunk's logits exist, so that they are computed once: three
products of [M, D] and [D, V] for forward and backward instead of four.

Source: Cut Your Losses in Large-Vocabulary Language Models (arXiv 2411.09009) for the problem; the chunking is along T
because the batch is what devices share.

Shapes: B batch, T sequence, C chunk, N chunks, M = B * C tokens of a chunk, D model dim, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    hidden_BTD: jax.Array,
    weights_DV: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    chunk: int,
    logits_dtype: str,
) -> jax.Array:
    """The sum over unmasked tokens of -log softmax(hidden @ weights)[target], in nats; a scalar in at least fp32.

    Args:
        hidden_BTD: vectors before the head, any float dtype.
        weights_DV: the head, any float dtype.
        targets_BT: token ids; those that are masked may be anything.
        mask_BT: bool, which tokens count.
        chunk: tokens of each sequence whose logits exist at one time; the last chunk may be shorter.
        logits_dtype: of the product with the head and its gradients' products; float32 means full fp32 on every device.
    """
    return _chunked(hidden_BTD, weights_DV, targets_BT, mask_BT, chunk, logits_dtype, with_gradients=False)[0]


def target_log_probs(
    hidden_BTD: jax.Array, weights_DV: jax.Array, targets_BT: jax.Array, chunk: int, logits_dtype: str
) -> jax.Array:
    """log softmax(hidden @ weights)[target] of every token: the first of `log_probs_and_entropies`."""
    return log_probs_and_entropies(hidden_BTD, weights_DV, targets_BT, chunk, logits_dtype)[0]


def log_probs_and_entropies(
    hidden_BTD: jax.Array,
    weights_DV: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
    logits_dtype: str,
    temperature: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden @ weights / temperature)[target] and that softmax's entropy, which is without gradient.

    Returns:
        (log-probabilities, entropies) [B, T] in nats, at least fp32; arguments as `cross_entropy_sum`.
    """

    def both(logits_MV, targets_M):
        target_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
        logsumexp_M = jax.nn.logsumexp(logits_MV, axis=-1)
        frozen_MV, frozen_M = jax.lax.stop_gradient((logits_MV, logsumexp_M))
        mean_M = jnp.sum(jnp.exp(frozen_MV - frozen_M[:, None]) * frozen_MV, axis=-1)
        return target_M - logsumexp_M, frozen_M - mean_M

    return map_logits(
        both, hidden_BTD, weights_DV, targets_BT, chunk=chunk, dtype=logits_dtype, temperature=temperature
    )


def map_logits(
    function: Callable[..., Any],
    hidden_BTD: jax.Array,
    weights_DV: jax.Array,
    *per_token: jax.Array,
    chunk: int,
    dtype: str,
    temperature: float | jax.Array = 1.0,
) -> Any:
    """function(logits_MV / temperature, *per_token [M, ...]) of every chunk, each of its results [M] joined to [B, T].

    A chunk's logits are computed again in the backward pass, when what weighs each token is known.

    Args:
        per_token: what else the function takes, [B, T, ...] each.
    """
    B, T, _ = hidden_BTD.shape
    wide = jnp.promote_types(dtype, jnp.float32)
    weights_DV = weights_DV.astype(dtype)
    precision = jax.lax.Precision.HIGHEST if weights_DV.dtype == jnp.float32 else None
    chunk = min(chunk, T)

    @jax.checkpoint
    def one_chunk(inputs):
        hidden_MD, *per_token = inputs
        logits_MV = jnp.einsum(
            "md,dv->mv", hidden_MD.astype(dtype), weights_DV, precision=precision, preferred_element_type=wide
        )
        return function(logits_MV / temperature, *per_token)

    results = jax.lax.map(one_chunk, tuple(_chunks(each, chunk) for each in (hidden_BTD, *per_token)))
    return jax.tree.map(lambda x_NM: _together(x_NM, B, chunk, T), results)


def _chunks(x_BTX: jax.Array, chunk: int) -> jax.Array:
    """[N, M, ...]: chunks of all rows' tokens, those of the last one padded."""
    B, T = x_BTX.shape[:2]
    x_BTX = jnp.pad(x_BTX, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x_BTX.ndim - 2))
    x_NBCX = jnp.moveaxis(x_BTX.reshape(B, -1, chunk, *x_BTX.shape[2:]), 1, 0)
    return x_NBCX.reshape(-1, B * chunk, *x_BTX.shape[2:])


def _together(x_NMX: jax.Array, B: int, chunk: int, T: int) -> jax.Array:
    """[B, T, ...] again."""
    x_BNCX = jnp.moveaxis(x_NMX.reshape(-1, B, chunk, *x_NMX.shape[2:]), 0, 1)
    return x_BNCX.reshape(B, -1, *x_NMX.shape[2:])[:, :T]


def _forward(hidden_BTD, weights_DV, targets_BT, mask_BT, chunk, logits_dtype):
    loss, dweights_DV, dhidden_BTD = _chunked(
        hidden_BTD, weights_DV, targets_BT, mask_BT, chunk, logits_dtype, with_gradients=True
    )
    return loss, (dhidden_BTD.astype(hidden_BTD.dtype), dweights_DV.astype(weights_DV.dtype))


def _backward(chunk, logits_dtype, gradients, dloss):
    dhidden_BTD, dweights_DV = (gradient * dloss.astype(gradient.dtype) for gradient in gradients)
    return dhidden_BTD, dweights_DV, None, None


cross_entropy_sum.defvjp(_forward, _backward)


def _chunked(hidden_BTD, weights_DV, targets_BT, mask_BT, chunk, logits_dtype, *, with_gradients):
    B, T, _ = hidden_BTD.shape
    wide = jnp.promote_types(logits_dtype, jnp.float32)
    weights_DV = weights_DV.astype(logits_dtype)
    # By default accelerators round the factors of an fp32 product.
    precision = jax.lax.Precision.HIGHEST if weights_DV.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)

    def one_chunk(sums, inputs):
        hidden_MD, targets_M, mask_M = inputs
        hidden_MD = hidden_MD.astype(logits_dtype)
        logits_MV = product("md,dv->mv", hidden_MD, weights_DV)
        is_target_MV = targets_M[:, None] == jnp.arange(weights_DV.shape[1])
        logsumexp_M = jax.nn.logsumexp(logits_MV, axis=-1)
        target_M = jnp.sum(logits_MV, axis=-1, where=is_target_MV)
        loss = jnp.sum(logsumexp_M - target_M, where=mask_M)
        if not with_gradients:
            return (sums[0] + loss,), ()
        dlogits_MV = jnp.where(mask_M[:, None], jnp.exp(logits_MV - logsumexp_M[:, None]) - is_target_MV, 0)
        dlogits_MV = dlogits_MV.astype(logits_dtype)
        dhidden_MD = product("mv,dv->md", dlogits_MV, weights_DV).astype(hidden_BTD.dtype)
        dweights_DV = product("md,mv->dv", hidden_MD, dlogits_MV)
        return (sums[0] + loss, sums[1] + dweights_DV), dhidden_MD

    chunk = min(chunk, T)
    zeros = (jnp.zeros((), wide),) + ((jnp.zeros(weights_DV.shape, wide),) if with_gradients else ())
    inputs = tuple(_chunks(each, chunk) for each in (hidden_BTD, targets_BT, mask_BT))
    sums, dhidden_NMD = jax.lax.scan(one_chunk, zeros, inputs)
    if not with_gradients:
        return sums
    return *sums, _together(dhidden_NMD, B, chunk, T)
