"""Adapters compute what their merged weights compute, and learn by the chain rule of the full gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import tiny_model

from lightning_jax import parallel
from lightning_jax.models import HybridLM, RewardModel, lora
from lightning_jax.models.config import FEED_FORWARD_WEIGHTS, MIXER_WEIGHTS, LoraConfig
from lightning_jax.objectives import NextToken

EVERYTHING = tuple(dict.fromkeys([*MIXER_WEIGHTS["lightning"], *MIXER_WEIGHTS["softmax"], *FEED_FORWARD_WEIGHTS]))
ADAPTERS = LoraConfig(rank=3, alpha=6.0, targets=EVERYTHING)
EXACT = {"param_dtype": "float64", "compute_dtype": "float64", "logits_dtype": "float64"}
B, T = 2, 12


def adapted(config, adapters=ADAPTERS, kind=HybridLM, operators=None):
    """A model whose adapters have learned something, as (graph, trained, frozen)."""
    model = kind(config, rngs=nnx.Rngs(0), **({"operators": operators} if operators else {}))
    lora.adapt(model, adapters, rngs=nnx.Rngs(1))
    graphdef, state = nnx.split(model, nnx.Param)
    trained, frozen = lora.split(state)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    trained = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), trained)
    return graphdef, trained, frozen


def batch():
    rng = np.random.default_rng(0)
    segment_ids = np.repeat([[1] * 7 + [2] * 5], B, axis=0)
    return {
        "inputs": jnp.asarray(rng.integers(32, size=(B, T))),
        "targets": jnp.asarray(rng.integers(32, size=(B, T))),
        "segment_ids": jnp.asarray(segment_ids),
        "positions": jnp.asarray(np.repeat([[*range(7), *range(5)]], B, axis=0)),
        "loss_mask": jnp.ones((B, T), bool),
    }


def loss_of(config, model):
    objective = NextToken(config)
    return objective.loss(objective.sums(model, batch()))[0]


@pytest.mark.parametrize("num_experts", [0, 4])
def test_merged_weights_compute_what_the_adapters_do(num_experts):
    with jax.enable_x64(True):
        config = dataclasses.replace(
            tiny_model(**EXACT), num_experts=num_experts, experts_per_token=min(num_experts, 2)
        )
        graphdef, trained, frozen = adapted(config)
        merged = lora.merged(nnx.merge_state(trained, frozen), ADAPTERS)
        plain = HybridLM(config, rngs=nnx.Rngs(3))
        assert jax.tree.structure(merged) == jax.tree.structure(nnx.state(plain, nnx.Param))
        nnx.update(plain, merged)
        value = loss_of(config, nnx.merge(graphdef, trained, frozen))
        np.testing.assert_allclose(value, loss_of(config, plain), rtol=1e-13)
        nnx.update(plain, lora.plain_of(frozen, ADAPTERS))
        assert abs(value - loss_of(config, plain)) > 1e-5  # the adapters matter


def test_gradients_of_adapters_are_the_full_gradient_projected():
    """dL/d down = scale dL/dW up^T and dL/d up = scale down^T dL/dW, for every target of dense and of expert layers."""
    with jax.enable_x64(True):
        config = tiny_model(**EXACT)
        graphdef, trained, frozen = adapted(config)
        gradients = jax.grad(lambda trained: loss_of(config, nnx.merge(graphdef, trained, frozen)))(trained)
        plain_graph = nnx.graphdef(HybridLM(config, rngs=nnx.Rngs(3)))
        merged = lora.merged(nnx.merge_state(trained, frozen), ADAPTERS)
        full = dict(nnx.to_flat_state(jax.grad(lambda params: loss_of(config, nnx.merge(plain_graph, params)))(merged)))
        adapters, found = dict(nnx.to_flat_state(trained)), dict(nnx.to_flat_state(gradients))
        owners = {path[:-1] for path in found}
        assert {".".join(map(str, owner[-2:])) for owner in owners} == set(EVERYTHING)
        for owner in owners:
            dW, down, up = full[owner][...], adapters[(*owner, "down")][...], adapters[(*owner, "up")][...]
            np.testing.assert_allclose(
                found[(*owner, "down")][...], 2.0 * dW @ jnp.swapaxes(up, -1, -2), rtol=1e-9, atol=1e-14
            )
            np.testing.assert_allclose(
                found[(*owner, "up")][...], 2.0 * jnp.swapaxes(down, -1, -2) @ dW, rtol=1e-9, atol=1e-14
            )


def test_new_adapters_change_nothing():
    config = tiny_model()
    model = HybridLM(config, rngs=nnx.Rngs(0))
    before = loss_of(config, model)
    lora.adapt(model, ADAPTERS, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(loss_of(config, model), before)


def test_only_targets_get_adapters_and_bfloat16_weights_float32_ones():
    config = tiny_model(param_dtype="bfloat16")
    _, trained, frozen = adapted(config, LoraConfig(2, 1.0, ("mixer.query", "feed_forward.up")))
    shapes = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(trained)}
    assert {path: array.shape for path, array in shapes.items()} == {
        "stacks/0/runs/0/feed_forward/up/down": (1, 1, 4, 16, 2),
        "stacks/0/runs/0/feed_forward/up/up": (1, 1, 4, 2, 16),
        "stacks/0/runs/1/feed_forward/up/down": (1, 1, 4, 16, 2),
        "stacks/0/runs/1/feed_forward/up/up": (1, 1, 4, 2, 16),
        "stacks/0/runs/1/mixer/query/down": (1, 1, 16, 2),
        "stacks/0/runs/1/mixer/query/up": (1, 1, 2, 16),
    }
    assert {str(array.dtype) for array in shapes.values()} == {"float32"}
    plain = nnx.state(HybridLM(config, rngs=nnx.Rngs(0)), nnx.Param)
    there_and_back = lora.plain_of(lora.frozen_of(plain, ADAPTERS), ADAPTERS)
    assert jax.tree.structure(there_and_back) == jax.tree.structure(plain)
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(plain))


def test_a_reward_models_head_is_trained_beside_the_adapters():
    _, trained, frozen = adapted(tiny_model(), kind=RewardModel)
    assert "head" in trained
    assert "head" not in frozen
    assert all(isinstance(leaf, lora.Adapter) for _, leaf in nnx.to_flat_state(trained["backbone"]))


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"expert": 2, "sequence": 2}])
def test_on_a_mesh_adapters_compute_the_same(axes):
    config = tiny_model()
    graphdef, trained, frozen = adapted(config)
    expected = jax.value_and_grad(lambda trained: loss_of(config, nnx.merge(graphdef, trained, frozen)))(trained)
    mesh = parallel.make_mesh(parallel.MeshConfig.of(**axes), jax.devices()[:4])
    graphdef = adapted(config, operators=parallel.operators(mesh, config))[0]
    trained, frozen = (jax.device_put(each, parallel.shardings(each, mesh)) for each in (trained, frozen))
    step = jax.jit(jax.value_and_grad(lambda trained: loss_of(config, nnx.merge(graphdef, trained, frozen))))
    for found, wanted in zip(jax.tree.leaves(step(trained)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-6)


def test_what_is_wrong_with_a_config_is_said():
    config = LoraConfig(rank=0, alpha=-1.0, targets=())
    assert config.problems() == [
        "rank: 0 is not positive",
        "alpha: -1.0 is not a positive number",
        'targets: empty; name a weight, such as "mixer.output"',
    ]
    model = tiny_model(layer_pattern=("lightning",))
    (problem,) = LoraConfig(1, 1.0, ("mixer.query", "mixer.gate")).problems_with(model)
    assert problem.startswith("targets: no layer of this model has mixer.query; there is mixer.query_key_value")
