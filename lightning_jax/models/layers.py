"""The pieces every layer is made of: parameters with logical axes, RMSNorm, the dense SwiGLU feed-forward.

Sources: RMSNorm (arXiv 1910.07467); SwiGLU (arXiv 2002.05202) equation 6.

Shapes: B batch, T sequence, D model dim, F feed-forward dim.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lightning_jax.models import initializers
from lightning_jax.models.config import ModelConfig
from lightning_jax.models.operators import LogicalAxes, Operators


def weight_matrix(
    config: ModelConfig, role: initializers.Role, shape: tuple[int, int], logical_axes: LogicalAxes, *, rngs: nnx.Rngs
) -> nnx.Param:
    """A weight [inputs, outputs] in the config's param_dtype, started by its role."""
    initialize = initializers.weight(config, role, *shape)
    return nnx.Param(initialize(rngs.params(), shape, config.param_dtype), logical_axes=logical_axes)


# Elementwise work that the backward pass repeats from its inputs: cheaper than the memory its results would take.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@recomputed
def gated(gate: jax.Array, x: jax.Array) -> jax.Array:
    """silu(gate) * x."""
    return jax.nn.silu(gate) * x


class RMSNorm(nnx.Module):
    """x / rms(x) in at least fp32, cast to the dtype of x, then times the weight."""

    def __init__(self, size: int, eps: float, logical_axis: str | None, *, param_dtype: str):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, param_dtype), logical_axes=(logical_axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        # Broadcast in one step: from [1, 1, D], jax 0.10's CPU backend takes the gradient of the weight from a batch of
        # one row a hundred times slower. Cast afterwards: so the gradient is summed in the dtype of the weight.
        return normed.astype(x.dtype) * jnp.broadcast_to(self.weight[...], x.shape).astype(x.dtype)


class SwiGLU(nnx.Module):
    """W_down (silu(W_gate x) * W_up x), no biases."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, operators: Operators):
        self.project = operators.project
        D, F = config.hidden_size, config.intermediate_size
        self.gate = weight_matrix(config, "feed_forward_in", (D, F), ("embed", "mlp"), rngs=rngs)
        self.up = weight_matrix(config, "feed_forward_in", (D, F), ("embed", "mlp"), rngs=rngs)
        self.down = weight_matrix(config, "feed_forward_out", (F, D), ("mlp", "embed"), rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.project(gated(self.project(x_BTD, self.gate), self.project(x_BTD, self.up)), self.down)
