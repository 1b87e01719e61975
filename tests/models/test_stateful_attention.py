"""New tokens against a state or a cache: the same as attention over everything at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.models import stateful_attention
from lightning_jax.models.softmax_attention import softmax_attention
from lightning_jax.models.stateful_attention import (
    KeyValues,
    cached_softmax_attention,
    lightning_attention_from,
    places,
)
from pallas_kernels import lightning_attention

LAYERS, BATCH, HEADS, GROUPS, DIM, LENGTH = 3, 2, 4, 2, 8, 23


@pytest.fixture
def attend():
    """Compiled anew, for the sizes of blocks of the test."""
    return jax.jit(lambda *arguments: cached_softmax_attention(*arguments))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(stateful_attention, "LEAST", 4)
    monkeypatch.setattr(stateful_attention, "MOST", 4)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def qkv(heads=GROUPS):
    return random(BATCH, LENGTH, HEADS, DIM), *(random(BATCH, LENGTH, heads, DIM, seed=seed) for seed in (1, 2))


def empty(capacity, fill=0.0):
    cache = jnp.full((LAYERS, BATCH, GROUPS, places(capacity), DIM), fill)
    return KeyValues(cache, cache)


@pytest.mark.parametrize("pieces", [[LENGTH], [1] * LENGTH, [9, 1, 13]])
@pytest.mark.parametrize("groups", [1, GROUPS, HEADS])
def test_pieces_of_a_sequence_attend_as_the_whole_does(small_blocks, attend, pieces, groups):
    q, k, v = qkv(groups)
    cache = jnp.zeros((LAYERS, BATCH, groups, places(LENGTH), DIM))
    cache, start, outputs = KeyValues(cache, cache), 0, []
    for size in pieces:
        part = slice(start, start + size)
        positions = jnp.tile(jnp.arange(start, start + size), (BATCH, 1))
        o, cache = attend(q[:, part], k[:, part], v[:, part], cache, 1, positions)
        outputs.append(o)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), softmax_attention(q, k, v), rtol=0, atol=2e-6)


def test_only_new_places_of_one_layer_are_written(attend):
    q, k, v = qkv()
    positions = jnp.array([[5, 6, 7], [-1, -1, 2]])
    _, cache = attend(q[:, :3], k[:, :3], v[:, :3], empty(10, fill=7.0), 2, positions)
    expected = np.full((LAYERS, BATCH, GROUPS, places(10), DIM), 7.0, np.float32)
    expected[2, 0, :, 5:8] = k[0, :3].swapaxes(0, 1)
    expected[2, 1, :, 2] = k[1, 2]
    np.testing.assert_array_equal(cache.k_LBGSK, expected)


def test_blocks_behind_the_longest_row_are_not_read(small_blocks, attend):
    """Not-a-number there would spread to every output; so a step's cost follows the tokens there are."""
    q, k, v = (x[:, :1] for x in qkv())
    cache = empty(40)
    for name in cache._fields:
        cache = cache._replace(**{name: getattr(cache, name).at[:, :, :, 8:].set(jnp.nan)})
    o, _ = attend(q, k, v, cache, 0, jnp.array([[7], [2]]))
    assert jnp.isfinite(o).all()
    o, _ = attend(q, k, v, cache, 0, jnp.array([[8], [2]]))
    assert jnp.isnan(o).any()


def test_padding_is_finite_and_not_remembered(attend):
    q, k, v = (x[:, :4] for x in qkv())
    o, cache = attend(q, k, v, empty(8), 0, jnp.full((BATCH, 4), -1))
    assert jnp.isfinite(o).all()
    assert (cache.k_LBGSK == 0).all()


def test_a_cache_is_whole_blocks():
    assert [places(capacity) for capacity in (1, 64, 65, 1000, 1025)] == [64, 64, 128, 1024, 1280]
    for batch in (1, 8, 100):
        for size in (64, 192, 320, 1280):
            assert size % stateful_attention._block(jnp.zeros((1, batch, 2, size, 64))) == 0


@pytest.mark.parametrize("pieces", [[LENGTH], [1] * LENGTH, [9, 1, 13]])
def test_lightning_attention_goes_on_from_its_state(pieces):
    q, k, v = qkv(HEADS)
    log_decay = jnp.array([-0.9, -0.3, -0.05, 0.0])
    expected, final = lightning_attention(q, k, v, log_decay, implementation="reference", return_final_state=True)
    go_on = jax.jit(functools.partial(lightning_attention_from, lightning_attention=lightning_attention))
    state, start, outputs = jnp.zeros_like(final), 0, []
    for size in pieces:
        part = slice(start, start + size)
        o, state = go_on(q[:, part], k[:, part], v[:, part], log_decay, state)
        outputs.append(o)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=2e-5)
