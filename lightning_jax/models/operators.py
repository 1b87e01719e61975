"""The operators through which a layout across devices may change how, never what, a layer computes.

Shapes: B batch, T sequence, H query heads, G key/value heads, K head dim.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

from lightning_jax.models.config import ModelConfig
from lightning_jax.models.experts import experts
from lightning_jax.models.lora import LowRank
from lightning_jax.models.softmax_attention import softmax_attention
from lightning_jax.models.stateful_attention import KeyValues, cached_softmax_attention, lightning_attention_from
from pallas_kernels import lightning_attention

LogicalAxes = tuple[str | None, ...]


def unconstrained(x: jax.Array, logical_axes: LogicalAxes) -> jax.Array:
    """Leaves the placement of an activation to the compiler."""
    return x


def project(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """x @ weight in the dtype of x.

    The tokens are flattened for the gradient of the weight: over two axes, batch and sequence, XLA's CPU backend first
    transposes the cotangent, which took a quarter of a small model's step.
    """
    y = x.reshape(-1, x.shape[-1]) @ weight[...].astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def sum_over_rows(function: Callable[..., jax.Array], weights_DV: jax.Array, *rows: jax.Array) -> jax.Array:
    """function(weights, *rows), a sum over the rows of a batch."""
    return function(weights_DV, *rows)


def map_rows(function: Callable[..., Any], weights_DV: jax.Array, *rows: jax.Array) -> Any:
    """function(weights, *rows), in each of whose arrays a row depends on the same row of the batch alone."""
    return function(weights_DV, *rows)


@dataclass(frozen=True)
class Operators:
    """What a parallel layout may replace; None is the computation on one device, as the model's config chooses it.

    Attributes:
        lightning_attention: (q_BTHK, k_BTHK, v_BTHK, log_decay_H, *, segment_ids) -> o_BTHK.
        softmax_attention: (q_BTHK, k_BTGK, v_BTGK, *, segment_ids_BT) -> o_BTHK, causal, scaled by 1/sqrt(K).
        lightning_attention_from: (q_BTHK, k_BTHK, v_BTHK, log_decay_H, state_BHKK) -> (o_BTHK, state_BHKK).
        cached_softmax_attention: (q_BTHK, k_BTGK, v_BTGK, KeyValues, layer, positions_BT) -> (o_BTHK, KeyValues).
        experts: (x_BTD, expert_BTk, weight_BTk, ExpertWeights, *, mask_BT) -> (y_BTD, assignments dropped).
        project: (x_BTD, weight [D, A]) -> x @ weight in the dtype of x; once complete, of adapted weights too.
        sum_over_rows: (function, weights_DV, *rows) -> function(weights_DV, *rows), where function is a sum over rows:
            each device may sum its own.
        map_rows: the same for a function that gives each row of the batch a row of each of its results.
        constrain: (activation, logical axes) -> the same activation, placed.
    """

    lightning_attention: Callable[..., jax.Array] | None = None
    softmax_attention: Callable[..., jax.Array] | None = None
    lightning_attention_from: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    cached_softmax_attention: Callable[..., tuple[jax.Array, KeyValues]] | None = None
    experts: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    project: Callable[[jax.Array, nnx.Param], jax.Array] = project
    sum_over_rows: Callable[..., jax.Array] = sum_over_rows
    map_rows: Callable[..., Any] = map_rows
    constrain: Callable[[jax.Array, LogicalAxes], jax.Array] = unconstrained


ONE_DEVICE = Operators()


# Cached, because modules compare their operators by identity: equal configs must get equal modules, or jit recompiles.
@functools.cache
def complete(operators: Operators, config: ModelConfig) -> Operators:
    """The operators with every one left open filled in as the config chooses."""
    lightning = functools.partial(lightning_attention, implementation=config.lightning_implementation)
    local = {
        "lightning_attention": lightning,
        "lightning_attention_from": functools.partial(lightning_attention_from, lightning_attention=lightning),
        "cached_softmax_attention": cached_softmax_attention,
        "softmax_attention": functools.partial(softmax_attention, implementation=config.attention_implementation),
        "experts": functools.partial(
            experts,
            dispatch=config.expert_dispatch,
            capacity_factor=config.capacity_factor,
            capacity_group=config.capacity_group,
        ),
    }
    chosen = {name: call for name, call in local.items() if getattr(operators, name) is None}
    return replace(operators, project=_through_adapters(operators.project), **chosen)


def _through_adapters(project: Callable[[jax.Array, nnx.Param], jax.Array]) -> Callable[..., jax.Array]:
    """The operator for weights that may have adapters."""

    def call(x: jax.Array, weight: nnx.Param | LowRank) -> jax.Array:
        return weight.project(x, project) if isinstance(weight, LowRank) else project(x, weight)

    return call
