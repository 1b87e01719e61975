"""Mixture of experts: a float32 router, top-k SwiGLU experts, and the losses that keep their loads even.

Sources: MiniMax-01 (arXiv 2501.08313) sections 2.1 and 4.2; GShard (arXiv 2006.16668) for the auxiliary loss.

Shapes: B batch, T sequence, D model dim, E experts, F feed-forward dim, k experts per token, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lightning_jax.models import initializers
from lightning_jax.models.config import ModelConfig
from lightning_jax.models.experts import ExpertWeights
from lightning_jax.models.operators import LogicalAxes, Operators


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """What a layer's router did, summed over the tokens that are not padding; a scan over layers stacks them.

    Being sums, they add across micro-batches and devices, so balance is judged over the global batch.
    """

    load_E: jax.Array  # assignments to each expert, float32, whether or not they were dropped
    probability_E: jax.Array  # router probabilities, float32
    dropped: jax.Array  # assignments dropped for want of capacity, float32 scalar


class MoE(nnx.Module):
    """Top-k mixture of SwiGLU experts without shared experts or biases."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, operators: Operators):
        self.config, self.operators = config, operators
        D, E, F = config.hidden_size, config.num_experts, config.intermediate_size

        def expert_weight(role: initializers.Role, shape: tuple[int, int], logical_axes: LogicalAxes) -> nnx.Param:
            initialize = initializers.weight(config, role, *shape)
            value_EXX = initialize(rngs.params(), (E, *shape), config.param_dtype)
            return nnx.Param(value_EXX, logical_axes=("experts", *logical_axes))

        # Always float32, as in the released checkpoints: rounding must not decide which expert a token goes to.
        route = initializers.weight(config, "router", D, E)
        self.router = nnx.Param(route(rngs.params(), (D, E), jnp.float32), logical_axes=("embed", None))
        self.gate = expert_weight("feed_forward_in", (D, F), ("expert_embed", "expert_mlp"))
        self.up = expert_weight("feed_forward_in", (D, F), ("expert_embed", "expert_mlp"))
        self.down = expert_weight("feed_forward_out", (F, D), ("expert_mlp", "expert_embed"))

    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array | None = None) -> tuple[jax.Array, RouterSums]:
        """Routes each token to its k experts and sums their outputs by renormalised probability.

        Args:
            x_BTD: tokens, in the dtype of the computation.
            mask_BT: False for padding, which gives 0 and counts nowhere.
        """
        config = self.config
        if mask_BT is None:
            mask_BT = jnp.ones(x_BTD.shape[:2], bool)

        router_dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTE = jnp.einsum(
            "btd,de->bte",
            x_BTD.astype(router_dtype),
            self.router[...].astype(router_dtype),
            precision=jax.lax.Precision.HIGHEST,
        )
        probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        expert_BTk, chosen_BTkE = top_experts(probability_BTE, config.experts_per_token)
        top_BTk = jnp.sum(probability_BTE[:, :, None], axis=-1, where=chosen_BTkE)
        weight_BTk = top_BTk / jnp.sum(top_BTk, axis=-1, keepdims=True)

        weights = ExpertWeights(self.gate[...], self.up[...], self.down[...])
        y_BTD, dropped = self.operators.experts(x_BTD, expert_BTk, weight_BTk, weights, mask_BT=mask_BT)
        sums = RouterSums(
            load_E=jnp.sum(chosen_BTkE & mask_BT[..., None, None], axis=(0, 1, 2), dtype=jnp.float32),
            probability_E=jnp.sum(probability_BTE, axis=(0, 1), where=mask_BT[..., None]),
            dropped=dropped,
        )
        return y_BTD, sums


def top_experts(probability_BTE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k most probable experts, best first and on ties the lower index: expert_BTk, and as booleans chosen_BTkE.

    One argmax after the other, not `jax.lax.top_k`: the compiler splits an argmax over devices by rows, but gathers
    the whole batch's probabilities for a top_k.
    """
    experts, chosen, left_BTE = [], [], probability_BTE
    for _ in range(k):
        expert_BT = jnp.argmax(left_BTE, axis=-1).astype(jnp.int32)
        chosen_BTE = expert_BT[..., None] == jnp.arange(probability_BTE.shape[-1])
        left_BTE = jnp.where(chosen_BTE, -jnp.inf, left_BTE)
        experts.append(expert_BT)
        chosen.append(chosen_BTE)
    return jnp.stack(experts, axis=-1), jnp.stack(chosen, axis=-2)


def router_auxiliary_loss(config: ModelConfig, sums: RouterSums, token_count: jax.Array) -> jax.Array:
    """The weighted load-balancing loss of all layers.

    "paper": alpha / E * sum_i f_i m_i for each layer, added over layers (MiniMax-01 section 2.1 and GShard, where every
    layer adds its own term, so that a router's gradient does not depend on the depth). The paper calls f_i the fraction
    of tokens sent to expert i: assignments over tokens, which sums to k; m_i is the mean probability.
    "huggingface": coefficient * E * sum_i f_i m_i with f and m taken over the tokens of all layers together, as
    transformers' `load_balancing_loss_func` does. With one layer it is E^2 times the paper's at the same coefficient.

    Args:
        sums: of the global batch, stacked to load_LE and probability_LE.
        token_count: tokens that are not padding, over which `sums` were taken.
    """
    load_LE = sums.load_E.reshape(-1, config.num_experts)
    probability_LE = sums.probability_E.reshape(-1, config.num_experts)
    # A batch of padding only has a loss of 0.
    tokens = jnp.maximum(token_count, 1)
    f_LE, m_LE = load_LE / tokens, probability_LE / tokens
    if config.router_aux_loss == "paper":
        return config.router_aux_coefficient / config.num_experts * jnp.sum(f_LE * m_LE)
    f_E, m_E = jnp.mean(f_LE, axis=0), jnp.mean(m_LE, axis=0)
    return config.router_aux_coefficient * config.num_experts * jnp.sum(f_E * m_E)
