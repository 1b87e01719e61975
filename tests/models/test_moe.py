"""The router, its sums and the two auxiliary losses, against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import tiny_model

from lightning_jax.models.moe import MoE, RouterSums, router_auxiliary_loss
from lightning_jax.models.operators import Operators, complete

B, T = 2, 13

CONFIG = tiny_model(
    vocab_size=16,
    hidden_size=6,
    num_layers=3,
    layer_pattern=("lightning",),
    num_heads=2,
    num_kv_heads=1,
    rotary_dim=4,
    intermediate_size=8,
    num_experts=5,
    residual_alpha=1.0,
    initializer_range=0.5,
    loss_chunk=8,
)


def make_moe(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return MoE(config, rngs=nnx.Rngs(0), operators=complete(Operators(), config))


def tokens(dtype=np.float32):
    x_BTD = np.random.default_rng(1).normal(size=(B, T, CONFIG.hidden_size))
    mask_BT = np.ones((B, T), bool)
    mask_BT[0, 9:] = False
    return jnp.asarray(x_BTD, dtype), mask_BT


def test_output_is_the_renormalised_top_k_sum_of_each_tokens_experts():
    moe = make_moe()
    x_BTD, mask_BT = tokens()
    y_BTD, sums = moe(x_BTD, jnp.asarray(mask_BT))

    router, gate, up, down = (np.asarray(p[...], np.float64) for p in (moe.router, moe.gate, moe.up, moe.down))
    load_E, probability_E = np.zeros(CONFIG.num_experts), np.zeros(CONFIG.num_experts)
    expected_BTD = np.zeros(x_BTD.shape)
    for b, t in np.argwhere(mask_BT):
        x_D = np.asarray(x_BTD[b, t], np.float64)
        exponential_E = np.exp(x_D @ router)
        probability = exponential_E / exponential_E.sum()
        chosen = np.argsort(-probability)[: CONFIG.experts_per_token]
        for e in chosen:
            gated_F = x_D @ gate[e]
            hidden_F = gated_F / (1 + np.exp(-gated_F)) * (x_D @ up[e])
            expected_BTD[b, t] += probability[e] / probability[chosen].sum() * (hidden_F @ down[e])
        load_E[chosen] += 1
        probability_E += probability
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sums.load_E, load_E)
    np.testing.assert_allclose(sums.probability_E, probability_E, rtol=1e-6)
    assert sums.dropped == 0


def test_without_a_mask_every_token_counts():
    x_BTD, _ = tokens()
    _, sums = make_moe()(x_BTD)
    assert sums.load_E.sum() == B * T * CONFIG.experts_per_token
    np.testing.assert_allclose(sums.probability_E.sum(), B * T, rtol=1e-6)


def test_router_stays_float32_while_experts_follow_the_config():
    moe = make_moe(param_dtype="bfloat16", compute_dtype="bfloat16")
    assert moe.router[...].dtype == jnp.float32
    assert moe.gate[...].dtype == moe.up[...].dtype == moe.down[...].dtype == jnp.bfloat16
    y_BTD, sums = moe(tokens(jnp.bfloat16)[0])
    assert y_BTD.dtype == jnp.bfloat16
    assert sums.probability_E.dtype == jnp.float32


def test_parameters_name_their_logical_axes():
    moe = make_moe()
    axes = {path[-1]: variable.get_metadata("logical_axes") for path, variable in nnx.to_flat_state(nnx.state(moe))}
    assert axes == {
        "router": ("embed", None),
        "gate": ("experts", "expert_embed", "expert_mlp"),
        "up": ("experts", "expert_embed", "expert_mlp"),
        "down": ("experts", "expert_mlp", "expert_embed"),
    }


def test_capacity_reports_what_it_drops():
    _, sums = make_moe(expert_dispatch="capacity", capacity_factor=0.5)(tokens()[0])
    assert 0 < sums.dropped < sums.load_E.sum()


def layers_of_routing(num_layers=3):
    """Router probabilities [L, N, E], the experts chosen [L, N, k], and their sums over tokens."""
    logits_LNE = np.random.default_rng(2).normal(size=(num_layers, 11, CONFIG.num_experts))
    probability_LNE = np.exp(logits_LNE) / np.exp(logits_LNE).sum(-1, keepdims=True)
    chosen_LNk = np.argsort(-logits_LNE, axis=-1)[..., : CONFIG.experts_per_token]
    load_LE = np.stack([np.bincount(chosen.ravel(), minlength=CONFIG.num_experts) for chosen in chosen_LNk])
    sums = RouterSums(jnp.asarray(load_LE, jnp.float32), jnp.asarray(probability_LNE.sum(1)), jnp.zeros(num_layers))
    return probability_LNE, chosen_LNk, sums


def test_paper_auxiliary_loss_adds_alpha_over_e_sum_f_m_of_each_layer():
    probability_LNE, chosen_LNk, sums = layers_of_routing()
    expected = 0.0
    for probability_NE, chosen_Nk in zip(probability_LNE, chosen_LNk, strict=True):
        for expert in range(CONFIG.num_experts):
            f = (chosen_Nk == expert).any(axis=1).mean()
            expected += 0.01 / CONFIG.num_experts * f * probability_NE[:, expert].mean()
    np.testing.assert_allclose(router_auxiliary_loss(CONFIG, sums, 11), expected, rtol=1e-6)


def test_huggingface_auxiliary_loss_concatenates_the_layers():
    config = dataclasses.replace(CONFIG, router_aux_loss="huggingface", router_aux_coefficient=0.001)
    probability_LNE, chosen_LNk, sums = layers_of_routing()
    # transformers' load_balancing_loss_func, line by line.
    expert_mask = np.eye(config.num_experts)[chosen_LNk.reshape(-1, config.experts_per_token)]
    tokens_per_expert = expert_mask.mean(axis=0)
    router_probability_per_expert = probability_LNE.reshape(-1, config.num_experts).mean(axis=0)
    expected = 0.001 * config.num_experts * (tokens_per_expert * router_probability_per_expert[None]).sum()
    np.testing.assert_allclose(router_auxiliary_loss(config, sums, 11), expected, rtol=1e-6)


@pytest.mark.parametrize("router_aux_loss", ["paper", "huggingface"])
def test_auxiliary_loss_is_least_and_level_when_the_load_is_even(router_aux_loss):
    config = dataclasses.replace(CONFIG, router_aux_loss=router_aux_loss)
    even_LE = jnp.full((2, config.num_experts), 4.0)
    even = RouterSums(even_LE, even_LE / 2, jnp.zeros(2))
    skewed_LE = even_LE + jnp.array([2.0, 1.0, 0.0, -1.0, -2.0])
    skewed = RouterSums(skewed_LE, skewed_LE / 2, jnp.zeros(2))
    assert router_auxiliary_loss(config, even, 10) < router_auxiliary_loss(config, skewed, 10)
    slope_LE = jax.grad(lambda p: router_auxiliary_loss(config, dataclasses.replace(even, probability_E=p), 10))(
        even.probability_E
    )
    np.testing.assert_allclose(slope_LE, slope_LE[0, 0], rtol=1e-6)


def test_a_batch_of_padding_only_has_no_auxiliary_loss():
    zeros_LE = jnp.zeros((2, CONFIG.num_experts))
    assert router_auxiliary_loss(CONFIG, RouterSums(zeros_LE, zeros_LE, jnp.zeros(2)), 0) == 0
