"""Decay slopes by their definition, and a lightning layer against the recurrence written out in numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_config import LLAMA

from lightning_jax.models.mixers import LightningAttention, Tokens, head_slopes, log_decays
from lightning_jax.models.operators import Operators, complete
from lightning_jax.models.rope import rotation


def alibi_slopes(heads):
    """ALiBi's published rule, recursively: a geometric series where H is a power of two, else two of them mixed."""
    if heads & (heads - 1) == 0:
        first = 2 ** (-8 / heads)
        return [first ** (h + 1) for h in range(heads)]
    below = 1
    while below * 2 <= heads:
        below *= 2
    return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: heads - below]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 8, 9, 12, 15, 64, 100])
def test_slopes_follow_alibis_rule(heads):
    np.testing.assert_allclose(head_slopes(heads), alibi_slopes(heads), rtol=1e-12)


def test_minimax_half_lives():
    """Layer 0 forgets half in 0.76 to 177 tokens; layer 78, the last lightning layer, in 60 to 14,007."""
    first, last = (np.log(2) / -log_decays(64, 80, layer) for layer in (0, 78))
    assert (round(first[0], 2), round(first[-1])) == (0.76, 177)
    assert (round(last[0]), round(last[-1])) == (60, 14_007)


def test_slopes_shrink_with_the_layer_and_one_layer_alone_is_the_first():
    np.testing.assert_allclose(log_decays(4, 5, 0), -head_slopes(4) * (1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(log_decays(4, 5, 3), -head_slopes(4) * (1 / 4 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(log_decays(4, 5, 4), -head_slopes(4) * 1e-5, rtol=1e-5)
    np.testing.assert_array_equal(log_decays(4, 1, 0), log_decays(4, 5, 0))


def test_lightning_layer_equals_the_written_out_recurrence():
    heads, dim, length = 3, 4, 11
    config = dataclasses.replace(
        LLAMA, hidden_size=10, num_layers=4, num_heads=heads, num_kv_heads=1, head_dim=dim, rotary_dim=2
    )
    layer = LightningAttention(config, rngs=nnx.Rngs(3), operators=complete(Operators(), config))
    rng = np.random.default_rng(0)
    for parameter in (layer.query_key_value, layer.gate, layer.output):
        parameter.set_value(jnp.asarray(rng.standard_normal(parameter.shape), jnp.float32))
    layer.norm.weight.set_value(jnp.asarray(1 + 0.1 * rng.standard_normal(heads * dim), jnp.float32))
    x = rng.standard_normal((1, length, 10)).astype(np.float32)

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    wide = [
        np.asarray(p[...], np.float64) for p in (layer.query_key_value, layer.gate, layer.norm.weight, layer.output)
    ]
    fused, gate, norm, output = wide
    z = x[0].astype(np.float64) @ fused
    z = (z * sigmoid(z)).reshape(length, heads, 3, dim)
    decay = np.array([np.exp(-s * (1 - 2 / 3 + 1e-5)) for s in (1 / 16, 1 / 256, 1 / 4)])
    state, expected = np.zeros((heads, dim, dim)), []
    for t in range(length):
        q, k, v = z[t, :, 0], z[t, :, 1], z[t, :, 2]
        state = decay[:, None, None] * state + k[:, :, None] * v[:, None, :]
        o = np.einsum("hk,hkv->hv", q, state).ravel()
        o = o / np.sqrt(np.mean(o**2) + 1e-6) * norm
        expected.append((o * sigmoid(x[0, t] @ gate)) @ output)

    tokens = Tokens(None, rotation(config, jnp.arange(length)[None]))
    ours, _ = layer(jnp.asarray(x), LightningAttention.constants(config, 2), tokens)
    np.testing.assert_allclose(ours[0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
