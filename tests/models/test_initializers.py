"""Standard deviations of every role, by the papers' formulas, and what a model really draws."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_config import LLAMA

from lightning_jax.models import HybridLM
from lightning_jax.models.initializers import standard_deviation

CONFIG = dataclasses.replace(LLAMA, hidden_size=256, num_layers=8)
XAVIER = math.sqrt(2 / (256 + 512))


@pytest.mark.parametrize(
    ("initializer", "role", "expected"),
    [
        ("normal", "query_key", 0.02),
        ("normal", "feed_forward_out", 0.02),
        ("deepnorm", "query_key", XAVIER),
        ("deepnorm", "gate", XAVIER),
        ("deepnorm", "router", XAVIER),
        ("deepnorm", "head", XAVIER),
        ("deepnorm", "value", 64**-0.25 * XAVIER),
        ("deepnorm", "attention_output", 64**-0.25 * XAVIER),
        ("deepnorm", "feed_forward_in", 64**-0.25 * XAVIER),
        ("deepnorm", "feed_forward_out", 64**-0.25 * XAVIER),
        ("deepnorm", "embedding", 1 / 16),
        ("tinyllama", "embedding", math.sqrt(2 / (5 * 256))),
        ("tinyllama", "value", math.sqrt(2 / (5 * 256))),
        ("tinyllama", "attention_output", 1 / 16 / 8),
        ("tinyllama", "feed_forward_out", 1 / 16 / 8),
    ],
)
def test_standard_deviation_by_role(initializer, role, expected):
    config = dataclasses.replace(CONFIG, initializer=initializer)
    assert standard_deviation(config, role, 256, 512) == pytest.approx(expected)


def test_minimax_gain_is_the_papers_beta():
    config = dataclasses.replace(CONFIG, num_layers=80, initializer="deepnorm")
    ratio = standard_deviation(config, "value", 256, 512) / standard_deviation(config, "query_key", 256, 512)
    assert ratio == pytest.approx(0.19882, abs=1e-5)


def test_the_fused_projection_of_a_lightning_layer_scales_its_values_only():
    sizes = {"vocab_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "rotary_dim": 64}
    config = dataclasses.replace(
        CONFIG, **sizes, layer_pattern=("lightning",), intermediate_size=64, initializer="deepnorm"
    )
    model = HybridLM(config, rngs=nnx.Rngs(0))
    mixer = model.stacks[0].runs[0].mixer
    weights = np.asarray(mixer.query_key_value[...]).reshape(2, 1, 256, 2, 3, 64)
    xavier = math.sqrt(2 / (256 + 128))
    np.testing.assert_allclose(weights.std(axis=(0, 1, 2, 3, 5)), [xavier, xavier, 0.5 * xavier], rtol=0.02)
    np.testing.assert_allclose(np.asarray(mixer.output[...]).std(), 0.5 * xavier, rtol=0.02)
    assert abs(np.corrcoef(weights[0].ravel(), weights[1].ravel())[0, 1]) < 0.02  # layers differ
    assert mixer.query_key_value[...].dtype == jnp.float32
