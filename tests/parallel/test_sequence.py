"""What a row that is split over devices sends, and softmax attention of it; losses and gradients: test_layout.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_hybrid import LENGTH, collectives, config, mesh, packed_batch
from tiny_model import tiny_model

from lightning_jax import parallel
from lightning_jax.models.softmax_attention import softmax_attention


def test_documents_of_the_batch_straddle_every_border_between_devices():
    segment_ids = packed_batch()["segment_ids"]
    for border in range(2, LENGTH, 2):
        assert ((segment_ids[:, border - 1] == segment_ids[:, border]) & (segment_ids[:, border] > 0)).any()


def softmax_on(sequence, method):
    model = tiny_model(num_heads=4, num_kv_heads=2, head_dim=8)
    return parallel.operators(mesh(sequence=sequence), model, method).softmax_attention


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
    on_mesh, model = mesh(sequence=8), config("auto", "float32")
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
    experts = parallel.operators(mesh(sequence=8), config("capacity", "float32")).experts
    x, routed = jnp.zeros((2, 32, 16)), jnp.zeros((2, 32, 2))
    message = r"^model\.capacity_group=6 does not divide the 4 tokens of a row that each of sequence=8 devices holds"
    with pytest.raises(parallel.ShardingError, match=message):
        experts(x, routed, routed, None, mask_BT=jnp.ones((2, 32), bool))
