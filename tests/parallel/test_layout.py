"""A layout across devices changes nothing but where things are computed and what is sent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_hybrid import LENGTH, ROWS, collectives, config, loss_and_gradients, mesh

from lightning_jax import parallel
from lightning_jax.models import Operators
from lightning_jax.models.experts import ExpertWeights

ONE_DEVICE = (1, 1, 1, 1)
# data x fsdp x expert x tensor x sequence x expert_tensor
FAST_LAYOUT = (1, 2, 2, 2)
EXPERT_TENSOR_LAYOUT = (1, 1, 2, 2, 1, 2)
LAYOUTS = [
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (1, 1, 8, 1),
    (4, 1, 1, 2),
    (2, 2, 2, 1),
    (2, 1, 2, 2),
    (1, 4, 1, 2),
    (1, 1, 4, 2),
    (2, 1, 1, 1, 1, 4),
    (1, 1, 2, 1, 2, 2),
]
SLOW_LAYOUTS = [pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS]


def assert_same(actual, expected, tolerance):
    np.testing.assert_allclose(actual.loss, expected.loss, rtol=tolerance)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 0, name
        np.testing.assert_allclose(actual.gradients[name], gradient, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("layout", [FAST_LAYOUT, EXPERT_TENSOR_LAYOUT, *SLOW_LAYOUTS])
def test_packed_batch_on_every_layout_equals_its_documents_alone_on_one_device(layout):
    alone = loss_and_gradients(ONE_DEVICE, "auto", "float64", packed=False)
    assert_same(loss_and_gradients(layout, "auto", "float64"), alone, 1e-10)


@pytest.mark.parametrize(
    "layout",
    [(2, 1, 2, 2), EXPERT_TENSOR_LAYOUT, *SLOW_LAYOUTS[:5:2], pytest.param((1, 2, 4, 1), marks=pytest.mark.slow)],
)
def test_capacity_drops_and_computes_the_same_on_every_layout(layout):
    one_device = loss_and_gradients(ONE_DEVICE, "capacity", "float64")
    assert_same(loss_and_gradients(layout, "capacity", "float64"), one_device, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dispatch"), [(FAST_LAYOUT, "ragged"), ((2, 2, 2, 1), "capacity")])
def test_float32_layouts_agree_to_rounding(layout, dispatch):
    one_device = loss_and_gradients(ONE_DEVICE, dispatch, "float32")
    assert_same(loss_and_gradients(layout, dispatch, "float32"), one_device, 1e-5)


def test_capacity_exchanges_places_all_to_all():
    shapes = collectives(loss_and_gradients((2, 1, 2, 2), "capacity", "float64").program)
    assert len(shapes["all-to-all"]) >= 4  # there and back, forward and backward


def test_dropless_gathers_tokens_and_scatters_their_sums():
    shapes = collectives(loss_and_gradients(FAST_LAYOUT, "auto", "float64").program)
    assert "all-to-all" not in shapes
    assert shapes["reduce-scatter"]


@pytest.mark.parametrize(("layout", "dispatch"), [(FAST_LAYOUT, "auto"), ((2, 1, 2, 2), "capacity")])
def test_no_collective_moves_the_whole_batch_or_attention_heads_or_a_stack_of_layers(layout, dispatch):
    rank_of_places = 4  # [rows, experts, places, model dim], all to all only
    for kind, shapes in collectives(loss_and_gradients(layout, dispatch, "float64").program).items():
        for shape in shapes:
            assert shape[:2] != (ROWS, LENGTH), (kind, shape)
            assert kind == "all-to-all" or len(shape) < rank_of_places, (kind, shape)


def test_one_device_needs_no_collectives_and_no_operators_of_its_own():
    assert parallel.operators(mesh(*ONE_DEVICE), config("auto", "float32")) == Operators()
    assert collectives(loss_and_gradients(ONE_DEVICE, "capacity", "float64").program) == {}


def test_equal_configs_get_equal_operators():
    assert parallel.operators(mesh(*FAST_LAYOUT), config("auto", "float32")) is parallel.operators(
        mesh(*FAST_LAYOUT), config("auto", "float32")
    )


def test_heads_that_do_not_divide_are_refused_by_name():
    wrong = dataclasses.replace(config("auto", "float32"), num_kv_heads=1)
    message = r"^model\.num_kv_heads=1 does not divide over mesh axis tensor=2; use a divisor of 1$"
    with pytest.raises(parallel.ShardingError, match=message):
        parallel.operators(mesh(*FAST_LAYOUT), wrong)
    only_lightning = dataclasses.replace(wrong, layer_pattern=("lightning",))
    assert parallel.operators(mesh(*FAST_LAYOUT), only_lightning).experts is not None


def test_constrain_places_an_activation():
    on_mesh = mesh(2, 2, 1, 2)
    x = jax.jit(lambda x: parallel.constrain(x, ("batch", "sequence", None), on_mesh))(np.zeros((8, 3, 4)))
    assert x.sharding.shard_shape(x.shape) == (2, 3, 4)


@pytest.mark.parametrize("dispatch", ["auto", "capacity"])
def test_gathered_expert_weights_are_not_kept_for_the_backward_pass(dispatch):
    on_mesh = mesh(1, 8, 1, 1)
    experts = parallel.operators(on_mesh, config(dispatch, "float32")).experts
    layers, rows, num_experts, D, F = 8, 8, 4, 64, 128
    weights = ExpertWeights(
        *(jax.ShapeDtypeStruct((layers, num_experts, *shape), jnp.float32) for shape in ((D, F), (D, F), (F, D)))
    )
    split = ExpertWeights(*(PartitionSpec(None, None, *spec) for spec in (("fsdp",), ("fsdp",), (None, "fsdp"))))
    split = jax.tree.map(lambda spec: NamedSharding(on_mesh, spec), split)
    expert_BTk = jnp.zeros((rows, 1, 1), jnp.int32)
    weight_BTk, mask_BT = jnp.ones((rows, 1, 1)), jnp.ones((rows, 1), bool)

    def loss(weights, x_BTD):
        def layer(x_BTD, weights):
            return experts(x_BTD, expert_BTk, weight_BTk, weights, mask_BT=mask_BT)[0], None

        return jnp.sum(jax.lax.scan(layer, x_BTD, weights)[0])

    gradient = jax.jit(jax.grad(loss), in_shardings=(split, parallel.batch_sharding(on_mesh)))
    compiled = gradient.lower(weights, jax.ShapeDtypeStruct((rows, 1, D), jnp.float32)).compile()
    all_layers = sum(weight.size * weight.dtype.itemsize for weight in weights)
    assert compiled.memory_analysis().temp_size_in_bytes < all_layers / 2
