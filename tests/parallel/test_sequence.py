"""A row split over devices gives the loss and gradients of the whole row, whichever way keys and values travel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_hybrid import LENGTH, collectives, config, loss_and_gradients, mesh, packed_batch
from tiny_model import tiny_model

from lightning_jax import parallel
from lightning_jax.models.softmax_attention import softmax_attention

ONE_DEVICE = (1, 1, 1, 1, 1)
# data x fsdp x expert x tensor x sequence: every pair of axes beside every size of "sequence".
LAYOUTS = [(1, 1, 1, 1, 8), (2, 1, 1, 2, 2), (1, 2, 2, 1, 2), (1, 2, 1, 2, 2), (2, 2, 1, 1, 2), (2, 1, 2, 1, 2)]
METHODS = ("ring", "all_gather")
SLOW_CASES = [(LAYOUTS[0], "all_gather"), *zip(LAYOUTS, itertools.cycle(METHODS))]
FAST_CASES = [((1, 2, 1, 1, 4), "ring"), ((1, 1, 2, 2, 2), "all_gather")]
CASES = FAST_CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]


def assert_same(actual, expected, tolerance):
    np.testing.assert_allclose(actual.loss, expected.loss, rtol=tolerance)
    for name, gradient in expected.gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(actual.gradients[name], gradient, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize(("layout", "method"), CASES)
def test_documents_that_straddle_devices_give_the_loss_and_gradients_of_each_alone(layout, method):
    alone = loss_and_gradients(ONE_DEVICE, "auto", "float64", packed=False)
    assert_same(loss_and_gradients(layout, "auto", "float64", sequence_attention=method), alone, 1e-10)


CAPACITY_LAYOUTS = [(1, 2, 1, 1, 4), (1, 1, 2, 2, 2), (1, 1, 1, 1, 8)]


SLOW_CAPACITY = [pytest.param(layout, marks=pytest.mark.slow) for layout in CAPACITY_LAYOUTS]


@pytest.mark.parametrize("layout", [(1, 1, 4, 1, 2), *SLOW_CAPACITY])
def test_capacity_drops_and_computes_the_same_on_split_rows(layout):
    one_device = loss_and_gradients(ONE_DEVICE, "capacity", "float64")
    assert_same(loss_and_gradients(layout, "capacity", "float64"), one_device, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance", "method"), [("float32", 1e-5, "all_gather"), ("float64", 1e-10, "ring")]
)
def test_rows_of_one_document_agree_with_one_device(dtype, tolerance, method):
    expected = loss_and_gradients(ONE_DEVICE, "auto", dtype, packed=False)
    actual = loss_and_gradients((2, 1, 1, 1, 4), "auto", dtype, packed=False, sequence_attention=method)
    assert_same(actual, expected, tolerance)


def test_documents_of_the_batch_straddle_every_border_between_devices():
    segment_ids = packed_batch()["segment_ids"]
    for border in range(2, LENGTH, 2):
        assert (segment_ids[:, border - 1] == segment_ids[:, border]).any()


@pytest.mark.parametrize(("layout", "method"), FAST_CASES)
def test_only_softmax_layers_see_more_of_a_row_than_their_own_part(layout, method):
    program = loss_and_gradients(layout, "auto", "float64", sequence_attention=method).program
    heads = config("auto", "float64").num_kv_heads
    for kind, shapes in collectives(program).items():
        for shape in shapes:
            keys_or_values = method == "all_gather" and len(shape) == 4 and shape[2] <= heads
            documents = len(shape) == 2
            assert LENGTH not in shape or keys_or_values or documents, (kind, shape)


def softmax_on(sequence, method):
    model = tiny_model(num_heads=4, num_kv_heads=2, head_dim=8)
    return parallel.operators(mesh(1, 1, 1, 1, sequence), model, method).softmax_attention


@pytest.mark.parametrize("method", ["ring", "all_gather"])
@pytest.mark.parametrize("segment_ids", [None, [1] * 13 + [2] * 3 + [1] * 25 + [3] * 7, [1] * 24 + [2] * 24])
def test_softmax_attention_of_a_split_row_is_that_of_the_whole(segment_ids, method):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = ((2, 48, 4, 8), (2, 48, 2, 8), (2, 48, 2, 8))
        inputs = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        weights = jnp.asarray(rng.normal(size=shapes[0]))
        ids = None if segment_ids is None else jnp.asarray([segment_ids] * 2)

        def value_and_gradients(attention):
            def loss(inputs):
                return jnp.sum(weights * attention(*inputs, segment_ids_BT=ids))

            return jax.jit(jax.value_and_grad(loss))(inputs)

        whole, split = value_and_gradients(softmax_attention), value_and_gradients(softmax_on(4, method))
    for expected, actual in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def bytes_by_collective(length):
    """Elements that a lightning layer's forward and backward pass moves, by kind of collective."""
    on_mesh, model = mesh(1, 1, 1, 1, sequence=8), config("auto", "float32")
    attention = parallel.operators(on_mesh, model).lightning_attention
    shape = (2, length, model.num_heads, model.head_dim)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(on_mesh, PartitionSpec(None, "sequence")))
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=x.sharding)

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, -jnp.ones(model.num_heads), segment_ids=ids) ** 2)

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids).compile().as_text()
    return {kind: sum(map(np.prod, shapes)) for kind, shapes in collectives(program).items()}


def test_what_a_lightning_layer_sends_does_not_depend_on_the_length():
    short, long = bytes_by_collective(64), bytes_by_collective(1024)
    assert short == long
    assert short["all-gather"] > 0


def test_groups_of_tokens_that_share_places_must_lie_on_one_device():
    experts = parallel.operators(mesh(1, 1, 1, 1, sequence=8), config("capacity", "float32")).experts
    x, routed = jnp.zeros((2, 32, 16)), jnp.zeros((2, 32, 2))
    message = r"^model\.capacity_group=6 does not divide the 4 tokens of a row that each of sequence=8 devices holds"
    with pytest.raises(parallel.ShardingError, match=message):
        experts(x, routed, routed, None, mask_BT=jnp.ones((2, 32), bool))
