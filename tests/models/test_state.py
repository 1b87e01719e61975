"""Going on from a state, in pieces of any size and token by token, is the forward pass over the whole sequences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hybrid import TINY

from lightning_jax.models import HybridLM

LENGTH = 29
MODELS = {
    "hybrid": TINY,
    "experts": dataclasses.replace(TINY, num_experts=4, experts_per_token=2),
    "llama": dataclasses.replace(TINY, layer_pattern=("softmax",), num_layers=2, norm_placement="pre"),
}
TOKENS = np.random.default_rng(1).integers(0, TINY.vocab_size, (3, LENGTH))


@functools.cache
def model(name):
    return HybridLM(MODELS[name], rngs=nnx.Rngs(0))


@functools.cache
def whole(name):
    """The hidden vectors of one forward pass."""
    return np.asarray(jax.jit(lambda tokens: model(name)(tokens)[0])(TOKENS))


@functools.cache
def compiled(name):
    graphdef, params = nnx.split(model(name))

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state, tokens_BT, positions_BT):
        return nnx.merge(graphdef, params).advance(tokens_BT, positions_BT, state)

    return advance


def in_pieces(name, lengths, pieces):
    """Hidden vectors of the first lengths[b] tokens of each row, left-padded to the sum of the pieces."""
    total = sum(pieces)
    tokens_BT, positions_BT = np.zeros((3, total), np.int32), np.full((3, total), -1, np.int32)
    for row, length in enumerate(lengths):
        if length:
            tokens_BT[row, -length:], positions_BT[row, -length:] = TOKENS[row, :length], np.arange(length)
    state, hidden, start = model(name).initial_state(3, LENGTH), [], 0
    for size in pieces:
        part = slice(start, start + size)
        hidden_BTD, state = compiled(name)(state, tokens_BT[:, part], positions_BT[:, part])
        hidden.append(np.asarray(hidden_BTD))
        start += size
    return np.concatenate(hidden, axis=1), state


def assert_same(name, lengths, hidden):
    for row, length in enumerate(lengths):
        if length:
            np.testing.assert_allclose(hidden[row, -length:], whole(name)[row, :length], rtol=0, atol=1e-5)


# Few sizes, so that few programs are compiled; their sums are all lengths.
PIECES = st.lists(st.sampled_from([1, 4, 11]), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) <= LENGTH)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(pieces=PIECES, data=st.data())
def test_pieces_of_any_size_and_rows_of_any_length_equal_one_forward_pass(name, pieces, data):
    lengths = data.draw(st.tuples(*[st.integers(0, sum(pieces))] * 3))
    hidden, _ = in_pieces(name, lengths, pieces)
    assert_same(name, lengths, hidden)


@pytest.mark.parametrize("name", MODELS)
def test_every_token_of_mixed_rows_decoded_one_by_one_equals_one_forward_pass(name):
    lengths = (LENGTH, 1, 13)
    hidden, _ = in_pieces(name, lengths, [1] * LENGTH)
    assert_same(name, lengths, hidden)


@pytest.mark.parametrize("name", MODELS)
def test_separate_layers_give_what_scanned_ones_do(name):
    tokens, positions = TOKENS[:, :6], np.tile(np.arange(6), (3, 1))
    state = model(name).initial_state(3, 6)
    advance = jax.jit(model(name).advance)
    scanned = advance(tokens, positions, state)
    apart = advance(tokens, positions, state, separate_layers=model(name).separate_layers())
    for one, other in zip(jax.tree.leaves(scanned), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_padding_leaves_an_empty_state_exactly_empty():
    _, state = in_pieces("hybrid", (0, 0, 7), [5, 11])
    for leaf in jax.tree.leaves(state):
        rows = np.moveaxis(np.asarray(leaf), 1, 0)
        assert (rows[:2] == 0).all()
        assert (rows[2] != 0).any()


def test_a_longer_capacity_changes_nothing():
    advance = jax.jit(model("hybrid").advance)
    tokens, positions = TOKENS[:, :6], np.tile(np.arange(6), (3, 1))
    short, long = (advance(tokens, positions, model("hybrid").initial_state(3, size))[0] for size in (6, 700))
    np.testing.assert_allclose(short, long, rtol=0, atol=1e-6)


def test_state_has_the_sizes_that_the_config_says():
    config = MODELS["hybrid"]
    state = jax.eval_shape(lambda: model("hybrid").initial_state(7, 512))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert size == 7 * (config.state_bytes_per_sequence() + 512 * config.kv_cache_bytes_per_token())
    bf16 = HybridLM(dataclasses.replace(config, compute_dtype="bfloat16"), rngs=nnx.Rngs(0)).initial_state(1, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(bf16)} == {jnp.dtype("float32"), jnp.dtype("bfloat16")}


def test_rope_theta_may_be_given():
    tokens, positions = TOKENS[:, :6], np.tile(np.arange(6), (3, 1))

    @jax.jit
    def both(theta):
        state = model("hybrid").initial_state(3, 6)
        advanced = model("hybrid").advance(tokens, positions, state, rope_theta=theta)[0]
        return advanced, model("hybrid")(tokens, rope_theta=theta)[0]

    hidden, expected = both(50.0)
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-5)
    assert np.abs(hidden - whole("hybrid")[:, :6]).max() > 1e-3


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", ["hybrid", pytest.param("experts", marks=pytest.mark.slow)])
def test_decoding_updates_the_state_in_place(name, separate):
    """No copy of the whole cache or of all layers' states in a step: the program's scratch space does not grow."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: HybridLM(MODELS[name], rngs=nnx.Rngs(0))))

    def scratch(capacity):
        def steps(params, state, tokens_B):
            network = nnx.merge(graphdef, params)
            layers = network.separate_layers() if separate else None

            def step(_, carry):
                tokens_B, position, state = carry
                positions_B1 = jnp.full((2, 1), position)
                hidden_BTD, state = network.advance(tokens_B[:, None], positions_B1, state, separate_layers=layers)
                return jnp.argmax(hidden_BTD[:, 0], axis=-1), position + 1, state

            return jax.lax.fori_loop(0, 10, step, (tokens_B, 0, state))

        state = jax.eval_shape(lambda: nnx.merge(graphdef, params).initial_state(2, capacity))
        tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
        compiled = jax.jit(steps, donate_argnums=1).lower(params, state, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(64 * 1024) <= scratch(1024) + 4096


def test_the_compiled_step_does_not_grow_with_depth():
    def size(num_layers):
        config = dataclasses.replace(TINY, num_layers=num_layers)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0))))
        state = jax.eval_shape(lambda: nnx.merge(graphdef, params).initial_state(2, 16))
        column = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        advance = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params).advance(*inputs))
        return advance.lower(params, column, column, state).as_text().count("\n")

    assert size(30) <= 1.02 * size(6)
