"""The layers that mix tokens, one class per kind in a model's layer pattern.

A mixer is a class with

- `Mixer(config, *, rngs, operators)`;
- `Mixer.constants(config, layer)`: a pytree of arrays that differ from layer to layer but are not learned;
- `Mixer.state(config, batch, capacity)`: a pytree of `StateArray`, what one layer remembers of the tokens so far, as
  zeros before the first;
- `mixer(x_BTD, constants, tokens, state) -> (y_BTD, state)`: without a state (None) every row is whole and nothing is
  remembered, as in training; with a `LayerState` the tokens go on from it, and padding (position -1, left of a row's
  tokens) must leave it as it is where it is still zero.

Another linear layer joins by its entry in `MIXERS` and its name in `LayerKind`.

Sources: lightning attention: MiniMax-01 (arXiv 2501.08313) section 2.2 and the released modelling code of MiniMax-M1;
softmax attention with grouped queries: arXiv 2305.13245.

Shapes: B batch, T sequence, D model dim, H query heads, G key/value heads, K head dim, A = H * K.
"""

import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lightning_jax.models import initializers
from lightning_jax.models.config import LayerKind, ModelConfig
from lightning_jax.models.layers import RMSNorm, recomputed, weight_matrix
from lightning_jax.models.operators import LogicalAxes, Operators
from lightning_jax.models.rope import Rotation, rotate
from lightning_jax.models.stateful_attention import KeyValues, places


class Tokens(NamedTuple):
    """What mixers know of the tokens besides their vectors: their documents and their places in them."""

    segment_ids_BT: jax.Array | None  # None: each row is one document
    rotation: Rotation
    positions_BT: jax.Array | None = None  # with a state: -1 is padding


class StateArray(NamedTuple):
    """One array of a layer's state: zeros of this shape and dtype, split over devices by its logical axes."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    logical_axes: LogicalAxes


class LayerState(NamedTuple):
    """The state of a run of equal layers, [layers, ...] each array, and which of the layers is meant.

    A mixer that writes only a part of its layer's arrays does so in the arrays of the whole run: what is read out whole
    is copied.
    """

    arrays: Any
    layer: jax.Array

    def read(self) -> Any:
        """The layer's own arrays."""
        return jax.tree.map(lambda array: array[self.layer], self.arrays)

    def write(self, own: Any) -> Self:
        """With other arrays for the layer."""

        def put(array: jax.Array, own: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(array, own, self.layer, 0)

        return self._replace(arrays=jax.tree.map(put, self.arrays, own))


class LightningAttention(nnx.Module):
    """Gated linear attention, one constant decay per head: S_t = exp(log_decay) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

    Queries, keys and values pass through silu; there is no rotary embedding, no scale and no denominator. The heads are
    normed jointly, gated by a sigmoid of the layer's input, and projected out.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, operators: Operators):
        self.num_heads, self.operators = config.num_heads, operators
        D, A = config.hidden_size, config.num_heads * config.head_dim
        # Head-major: each head's query, key and value columns are contiguous, as in the released weights.
        parts_DHK = [
            initializers.weight(config, role, D, A)(
                rngs.params(), (D, config.num_heads, config.head_dim), config.param_dtype
            )
            for role in ("query_key", "query_key", "value")
        ]
        fused = jnp.stack(parts_DHK, axis=2).reshape(D, 3 * A)
        self.query_key_value = nnx.Param(fused, logical_axes=("embed", "heads"))
        self.gate = weight_matrix(config, "gate", (D, A), ("embed", "heads"), rngs=rngs)
        self.norm = RMSNorm(A, config.lightning_norm_eps, "heads", param_dtype=config.param_dtype)
        self.output = weight_matrix(config, "attention_output", (A, D), ("heads", "embed"), rngs=rngs)

    @staticmethod
    def constants(config: ModelConfig, layer: int) -> np.ndarray:
        """The logarithm of each head's decay per token, fp32 [H]."""
        return log_decays(config.num_heads, config.num_layers, layer)

    @staticmethod
    def state(config: ModelConfig, batch: int, capacity: int) -> StateArray:
        """The sum of decayed key-value products [B, H, K, K]; `capacity` does not matter."""
        shape = (batch, config.num_heads, config.head_dim, config.head_dim)
        return StateArray(shape, jnp.promote_types(config.compute_dtype, jnp.float32), ("batch", "heads", None, None))

    def __call__(
        self, x_BTD: jax.Array, log_decay_H: jax.Array, tokens: Tokens, state: LayerState | None = None
    ) -> tuple[jax.Array, LayerState | None]:
        fused_BTA3 = recomputed(jax.nn.silu)(self.operators.project(x_BTD, self.query_key_value))
        q_BTHK, k_BTHK, v_BTHK = jnp.split(fused_BTA3.reshape(*x_BTD.shape[:2], self.num_heads, -1), 3, axis=-1)
        if state is None:
            o_BTHK = self.operators.lightning_attention(
                q_BTHK, k_BTHK, v_BTHK, log_decay_H, segment_ids=tokens.segment_ids_BT
            )
        else:
            k_BTHK = jnp.where(tokens.positions_BT[..., None, None] < 0, 0, k_BTHK)
            o_BTHK, state_BHKK = self.operators.lightning_attention_from(
                q_BTHK, k_BTHK, v_BTHK, log_decay_H, state.read()
            )
            state = state.write(state_BHKK)
        o_BTA = self.norm(o_BTHK.reshape(*x_BTD.shape[:2], -1))
        gated_BTA = sigmoid_gated(self.operators.project(x_BTD, self.gate), o_BTA)
        return self.operators.project(gated_BTA, self.output), state


@recomputed
def sigmoid_gated(gate: jax.Array, x: jax.Array) -> jax.Array:
    """sigmoid(gate) * x."""
    return jax.nn.sigmoid(gate) * x


def log_decays(num_heads: int, num_layers: int, layer: int) -> np.ndarray:
    """Logarithms of the decays of one layer, fp32 [H]: minus its heads' slopes, smaller the deeper the layer.

    `layer` counts every layer of the model from 0, whatever its kind.
    """
    depth = layer / (num_layers - 1) if num_layers > 1 else 0.0
    return (-head_slopes(num_heads) * (1 - depth + 1e-5)).astype(np.float32)


def head_slopes(num_heads: int) -> np.ndarray:
    """Slopes 2^(-8(h+1)/H), fp64 [H]; where H is no power of two, ALiBi's rule (arXiv 2108.12409).

    The rule: the slopes of the power of two below, then every other slope of the power of two above.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between[: num_heads - power]])


class SoftmaxAttention(nnx.Module):
    """Causal softmax attention with grouped key/value heads and rotary embedding on the leading dimensions of heads."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, operators: Operators):
        self.head_dim, self.operators = config.head_dim, operators
        D, A, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = weight_matrix(config, "query_key", (D, A), ("embed", "heads"), rngs=rngs)
        self.key = weight_matrix(config, "query_key", (D, kv), ("embed", "kv_heads"), rngs=rngs)
        self.value = weight_matrix(config, "value", (D, kv), ("embed", "kv_heads"), rngs=rngs)
        self.output = weight_matrix(config, "attention_output", (A, D), ("heads", "embed"), rngs=rngs)

    @staticmethod
    def constants(config: ModelConfig, layer: int) -> tuple[()]:
        """Softmax layers do not differ by depth."""
        return ()

    @staticmethod
    def state(config: ModelConfig, batch: int, capacity: int) -> KeyValues:
        """The keys, rotated, and values of up to `capacity` tokens [B, G, S, K], in the compute dtype."""
        shape = (batch, config.num_kv_heads, places(capacity), config.head_dim)
        array = StateArray(shape, jnp.dtype(config.compute_dtype), ("batch", "kv_heads", None, None))
        return KeyValues(array, array)

    def __call__(
        self, x_BTD: jax.Array, constants: tuple[()], tokens: Tokens, state: LayerState | None = None
    ) -> tuple[jax.Array, LayerState | None]:
        def heads(weight: nnx.Param) -> jax.Array:
            return self.operators.project(x_BTD, weight).reshape(*x_BTD.shape[:2], -1, self.head_dim)

        q_BTHK = rotate(heads(self.query), tokens.rotation)
        k_BTGK, v_BTGK = rotate(heads(self.key), tokens.rotation), heads(self.value)
        if state is None:
            o_BTHK = self.operators.softmax_attention(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT=tokens.segment_ids_BT)
        else:
            o_BTHK, cache = self.operators.cached_softmax_attention(
                q_BTHK, k_BTGK, v_BTGK, state.arrays, state.layer, tokens.positions_BT
            )
            state = state._replace(arrays=cache)
        return self.operators.project(o_BTHK.reshape(*x_BTD.shape[:2], -1), self.output), state


MIXERS: dict[LayerKind, type[nnx.Module]] = {"lightning": LightningAttention, "softmax": SoftmaxAttention}
