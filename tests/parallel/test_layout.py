"""A layout across devices changes nothing but where things are computed and what is sent."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_hybrid import (
    LENGTH,
    ROWS,
    VOCABULARY,
    assert_same,
    collectives,
    config,
    loss_and_gradients,
    mesh,
    on_first_devices,
)

from lightning_jax import parallel
from lightning_jax.models import Operators
from lightning_jax.models.experts import ExpertWeights
from lightning_jax.parallel import MeshConfig
from lightning_jax.parallel.config import AXES

ONE_DEVICE = MeshConfig.of()
GATHERED = {"sequence_attention": "all_gather"}
FSDP_EXPERT_TENSOR = MeshConfig.of(fsdp=2, expert=2, tensor=2)
DATA_EXPERT_TENSOR = MeshConfig.of(data=2, expert=2, tensor=2)
EXPERT_TENSOR = MeshConfig.of(expert=2, expert_tensor=2, tensor=2)
RING = MeshConfig.of(fsdp=2, sequence=4)
ALL_GATHER = dataclasses.replace(MeshConfig.of(expert=2, sequence=2, tensor=2), **GATHERED)
FAST = [FSDP_EXPERT_TENSOR, EXPERT_TENSOR, RING, ALL_GATHER]


def every_layout():
    """All products of axes of eight devices, with both ways of keys and values where rows are split."""
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES)):
        if math.prod(sizes) == 8:
            layout = MeshConfig.of(**dict(zip(AXES, sizes, strict=True)))
            yield layout
            if layout.sequence > 1:
                yield dataclasses.replace(layout, **GATHERED)


def cases(layouts, fast=()):
    """Each with its name, and slow but for a few."""

    def name(layout):
        sizes = "-".join(f"{axis}{size}" for axis, size in layout.sizes().items() if size > 1)
        return sizes + ("-all_gather" if layout.sequence_attention == "all_gather" else "")

    return [
        pytest.param(layout, id=name(layout), marks=() if layout in fast else pytest.mark.slow) for layout in layouts
    ]


def test_there_are_56_products_of_which_21_split_rows():
    layouts = list(every_layout())
    assert len(layouts) == len(set(layouts)) == 56 + 21
    assert set(FAST) <= set(layouts)


@pytest.mark.parametrize("layout", cases(every_layout(), FAST))
def test_every_layout_equals_one_device_and_packed_documents_each_alone(layout):
    expected = loss_and_gradients(ONE_DEVICE, "auto", "float64").alone
    actual = loss_and_gradients(layout, "auto", "float64")
    assert_same(actual.packed, expected, 1e-10)
    assert_same(actual.alone, expected, 1e-10)


# Groups of tokens share an expert's places whatever device they lie on.
FAST_CAPACITY = [DATA_EXPERT_TENSOR, EXPERT_TENSOR, MeshConfig.of(expert=4, sequence=2)]
SLOW_CAPACITY = [
    MeshConfig.of(data=8),
    MeshConfig.of(expert=8),
    MeshConfig.of(sequence=8),
    MeshConfig.of(fsdp=2, expert=4),
    MeshConfig.of(fsdp=2, sequence=4),
    MeshConfig.of(expert=2, sequence=2, tensor=2),
]


@pytest.mark.parametrize("layout", [*cases(FAST_CAPACITY, FAST_CAPACITY), *cases(SLOW_CAPACITY)])
def test_capacity_drops_and_computes_the_same_on_every_layout(layout):
    one_device = loss_and_gradients(ONE_DEVICE, "capacity", "float64")
    actual = loss_and_gradients(layout, "capacity", "float64")
    assert_same(actual.packed, one_device.packed, 1e-10)
    assert_same(actual.alone, one_device.alone, 1e-10)


@pytest.mark.slow
def test_gradients_added_up_in_a_dtype_of_their_own_are_those_of_one_device():
    expected = loss_and_gradients(ONE_DEVICE, "auto", "float64").alone
    # "float32" means at least that.
    layout = dataclasses.replace(MeshConfig.of(fsdp=2, sequence=2, expert_tensor=2), gradient_dtype="float32")
    assert_same(loss_and_gradients(layout, "auto", "float64").packed, expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dispatch"),
    [
        (FSDP_EXPERT_TENSOR, "ragged"),
        (MeshConfig.of(data=2, fsdp=2, expert=2), "capacity"),
        (MeshConfig.of(data=2, sequence=4), "auto"),
        (dataclasses.replace(MeshConfig.of(fsdp=2, sequence=2, tensor=2), **GATHERED), "auto"),
    ],
)
def test_float32_layouts_agree_to_rounding(layout, dispatch):
    one_device, actual = (loss_and_gradients(each, dispatch, "float32") for each in (ONE_DEVICE, layout))
    assert_same(actual.packed, one_device.packed, 1e-5)
    assert_same(actual.alone, one_device.alone, 1e-5)


def test_capacity_exchanges_places_all_to_all():
    shapes = collectives(loss_and_gradients(DATA_EXPERT_TENSOR, "capacity", "float64").program)
    assert len(shapes["all-to-all"]) >= 4  # there and back, forward and backward


def test_dropless_gathers_tokens_and_scatters_their_sums():
    shapes = collectives(loss_and_gradients(FSDP_EXPERT_TENSOR, "auto", "float64").program)
    assert "all-to-all" not in shapes
    assert shapes["reduce-scatter"]


@pytest.mark.parametrize(("layout", "dispatch"), [(FSDP_EXPERT_TENSOR, "auto"), (DATA_EXPERT_TENSOR, "capacity")])
def test_no_collective_moves_the_whole_batch_or_attention_heads_or_a_stack_of_layers(layout, dispatch):
    rank_of_places = 4  # [rows, experts, places, model dim], all to all only
    for kind, shapes in collectives(loss_and_gradients(layout, dispatch, "float64").program).items():
        for shape in shapes:
            assert shape[:2] != (ROWS, LENGTH), (kind, shape)
            assert kind == "all-to-all" or len(shape) < rank_of_places, (kind, shape)


@pytest.mark.parametrize("layout", [RING, ALL_GATHER])
def test_only_softmax_layers_see_more_of_a_row_than_their_own_part(layout):
    heads = config("auto", "float64").num_kv_heads
    for kind, shapes in collectives(loss_and_gradients(layout, "auto", "float64").program).items():
        for shape in shapes:
            keys_or_values = layout == ALL_GATHER and len(shape) == 4 and shape[2] <= heads
            documents = len(shape) == 2
            assert LENGTH not in shape or keys_or_values or documents, (kind, shape)


@pytest.mark.parametrize("axes", [{"tensor": 8}, {"sequence": 2, "tensor": 4}, {"data": 2, "tensor": 4}])
def test_what_is_given_for_each_row_has_the_gradient_of_one_device(axes):
    on_mesh, rng = mesh(**axes), np.random.default_rng(0)
    weights, rows = rng.normal(size=(16, VOCABULARY)), rng.normal(size=(ROWS, LENGTH, 16))

    def gradient(operators, weights, rows):
        def loss(weights):
            return jnp.sum(operators.map_rows(lambda weights, rows: jnp.sin(rows @ weights), weights, rows) ** 2)

        return jax.jit(jax.grad(loss))(weights)

    with jax.enable_x64(True):
        expected = gradient(Operators(), weights, rows)
        rows = jax.device_put(rows, parallel.batch_sharding(on_mesh))
        actual = gradient(parallel.operators(on_mesh, config("auto", "float64")), weights, rows)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def test_one_device_needs_no_collectives_and_no_operators_of_its_own():
    assert parallel.operators(on_first_devices(ONE_DEVICE), config("auto", "float32")) == Operators()
    assert collectives(loss_and_gradients(ONE_DEVICE, "capacity", "float64").program) == {}


def test_equal_configs_get_equal_operators():
    first, second = (parallel.operators(mesh(fsdp=2, expert=2, tensor=2), config("auto", "float32")) for _ in range(2))
    assert first is second


def test_heads_that_do_not_divide_are_refused_by_name():
    wrong = dataclasses.replace(config("auto", "float32"), num_kv_heads=1)
    message = r"^model\.num_kv_heads=1 does not divide over mesh axis tensor=2; use a divisor of 1$"
    with pytest.raises(parallel.ShardingError, match=message):
        parallel.operators(mesh(fsdp=4, tensor=2), wrong)
    only_lightning = dataclasses.replace(wrong, layer_pattern=("lightning",))
    assert parallel.operators(mesh(fsdp=4, tensor=2), only_lightning).experts is not None


def test_constrain_places_an_activation():
    on_mesh = mesh(data=2, fsdp=2, tensor=2)
    x = jax.jit(lambda x: parallel.constrain(x, ("batch", "sequence", None), on_mesh))(np.zeros((8, 3, 4)))
    assert x.sharding.shard_shape(x.shape) == (2, 3, 4)


@pytest.mark.parametrize("dispatch", ["auto", "capacity"])
def test_gathered_expert_weights_are_not_kept_for_the_backward_pass(dispatch):
    on_mesh = mesh(fsdp=8)
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
