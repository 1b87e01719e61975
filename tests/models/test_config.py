"""Published parameter counts, FLOPs and bytes, exactly; and one line per mistake."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_model import tiny_model

from lightning_jax.models import HybridLM, RopeScaling

LLAMA = tiny_model(
    vocab_size=32000,
    hidden_size=2048,
    num_layers=22,
    layer_pattern=("softmax",),
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    rotary_dim=64,
    intermediate_size=5632,
    num_experts=0,
    experts_per_token=0,
    capacity_factor=1.25,
    capacity_group=8192,
    norm_placement="pre",
    residual_alpha=1.0,
    loss_chunk=512,
)
MINIMAX = dataclasses.replace(
    LLAMA,
    vocab_size=200_064,
    hidden_size=6144,
    num_layers=80,
    layer_pattern=("lightning",) * 7 + ("softmax",),
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rotary_dim=64,
    intermediate_size=9216,
    num_experts=32,
    experts_per_token=2,
    norm_placement="post",
    residual_alpha=160**0.25,
    compute_dtype="bfloat16",
)


def llama(vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, tie_embeddings):
    return dataclasses.replace(
        LLAMA,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        tie_embeddings=tie_embeddings,
    )


PUBLISHED = {
    "MiniMax-Text-01 and M1": (MINIMAX, 456_089_655_296),
    "TinyLlama": (LLAMA, 1_100_048_384),
    "SmolLM2-135M": (llama(49152, 576, 1536, 30, 9, 3, 64, True), 134_515_008),
    "SmolLM2-360M": (llama(49152, 960, 2560, 32, 15, 5, 64, True), 361_821_120),
    "SmolLM2-1.7B": (llama(49152, 2048, 8192, 24, 32, 32, 64, True), 1_711_376_384),
    "Llama-3.1-8B": (llama(128256, 4096, 14336, 32, 32, 8, 128, False), 8_030_261_248),
    "Llama-3.1-70B": (llama(128256, 8192, 28672, 80, 64, 8, 128, False), 70_553_706_496),
    "Llama-3.1-405B": (llama(128256, 16384, 53248, 126, 128, 8, 128, False), 405_853_388_800),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_model(name):
    config, parameters = PUBLISHED[name]
    assert config.num_parameters() == parameters
    assert config.problems() == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_module_has_as_many_parameters_as_its_config_says(name):
    config, parameters = PUBLISHED[name]
    shapes = nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param))) == parameters


def test_the_module_counts_layers_beyond_the_last_whole_pattern():
    small = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_layers": 5,
        "layer_pattern": ("lightning", "lightning", "softmax"),
    }
    small |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rotary_dim": 4, "intermediate_size": 24}
    for experts in ({}, {"num_experts": 4, "experts_per_token": 2}):
        config = dataclasses.replace(LLAMA, **small, **experts)
        model = HybridLM(config, rngs=nnx.Rngs(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == config.num_parameters()
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


def test_active_parameters_of_minimax_are_the_quoted_45_9_billion():
    assert MINIMAX.num_active_parameters() == 45_944_920_064


def test_minimax_weights_in_bf16_are_as_large_as_the_released_files():
    assert MINIMAX.weight_bytes("bfloat16") == 912_210_767_872


def test_cache_and_state_of_minimax():
    assert MINIMAX.kv_cache_bytes_per_token() == 40_960
    assert MINIMAX.state_bytes_per_sequence() == 70 * 64 * 128 * 128 * 4  # 294 MB
    assert MINIMAX.optimizer_bytes("float32") == 8 * 456_089_655_296


@pytest.mark.parametrize(
    ("convention", "percent"), [("6N", 50.8), ("6(N-VD)+12LHKT", 56.3), ("6N+12LHKT", 59.3), ("model", 52.0)]
)
def test_tinyllama_flops_utilisation_by_convention(convention, percent):
    """24,000 tokens/s on an A100 of 312 TFLOP/s is TinyLlama's quoted 56%, by the convention they used."""
    utilisation = 100 * 24_000 * LLAMA.flops_per_token(2048, convention) / 312e12
    assert utilisation == pytest.approx(percent, abs=0.05)


def test_model_flops_of_minimax_equal_the_closed_form():
    """Forward F(N) / N = 2 P + 10 layers * 64 heads * 4 * 128 * (N + 1) / 2 + lightning, P with the head."""
    products = MINIMAX.num_active_parameters() - 161 * 6144 - 70 * 8192 + 200_064 * 6144
    forward = 2 * products + 327_680 * (65536 + 1) / 2 + 70 * 64 * 4 * 128**2
    assert MINIMAX.flops_per_token(65536, "model") == 3 * forward


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads=64; use 2"),
        ({"rotary_dim": 63}, "rotary_dim: 63 must be even and between 0 and head_dim=128"),
        ({"rotary_dim": 130}, "rotary_dim: 130 must be even and between 0 and head_dim=128"),
        ({"experts_per_token": 33}, "experts_per_token: 33 must be between 1 and num_experts=32"),
        ({"experts_per_token": 0}, "experts_per_token: 0 must be between 1 and num_experts=32"),
        ({"num_experts": 0}, "experts_per_token: 2 must be 0 where num_experts=0"),
        ({"layer_pattern": ()}, "layer_pattern: empty; name at least one kind of layer"),
        ({"num_layers": 4}, "layer_pattern: 8 layers exceed num_layers=4; shorten it"),
        ({"hidden_size": 0}, "hidden_size: 0 is not a positive number"),
        ({"num_kv_heads": 0}, "num_kv_heads: 0 is not a positive number"),
        ({"residual_alpha": float("nan")}, "residual_alpha: nan is not a positive number"),
        ({"capacity_factor": 0.0}, "capacity_factor: 0.0 is not a positive number"),
        ({"router_aux_coefficient": -1.0}, "router_aux_coefficient: -1.0 is negative; 0 turns the loss off"),
    ],
)
def test_each_mistake_is_one_line(change, line):
    assert dataclasses.replace(MINIMAX, **change).problems() == [line]


def test_rope_scaling_mistakes_are_one_line_each():
    assert RopeScaling(8.0, 1.0, 4.0, 8192).problems() == []
    assert [line.split(":")[0] for line in RopeScaling(0.5, 4.0, 1.0, 0).problems()] == [
        "factor",
        "low_frequency_factor",
        "original_context_length",
    ]
