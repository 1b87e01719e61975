"""No document leaks into another: a packed batch's loss and gradients are those of its documents alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model

from lightning_jax.models import HybridLM
from lightning_jax.objectives import NextToken

T, ROWS, DOCUMENTS = 150, 2, 8  # longer than two chunks of lightning attention and a block of softmax attention

MODEL = tiny_model(
    vocab_size=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_experts=0,
    experts_per_token=0,
    capacity_factor=2.0,
    residual_alpha=6**0.25,
    initializer="deepnorm",
    loss_chunk=64,
)
MODELS = {
    "lightning": dataclasses.replace(MODEL, layer_pattern=("lightning",), num_layers=1),
    "softmax": dataclasses.replace(MODEL, layer_pattern=("softmax",), num_layers=1, norm_placement="pre"),
    "hybrid": MODEL,
    "experts": dataclasses.replace(MODEL, num_experts=4, experts_per_token=2, num_layers=2),
}


def rows(documents, count):
    """A batch of `count` rows, each the list of documents given, the rest padding."""
    batch = {name: np.zeros((count, T), np.int32) for name in ("inputs", "targets", "segment_ids", "positions")}
    for row, pieces in enumerate(documents):
        start = 0
        for number, tokens in enumerate(pieces, 1):
            stop = start + len(tokens)
            batch["inputs"][row, start:stop] = tokens
            batch["targets"][row, start : stop - 1] = tokens[1:]
            batch["segment_ids"][row, start:stop] = number
            batch["positions"][row, start:stop] = np.arange(len(tokens))
            start = stop
    same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    batch["loss_mask"] = np.pad(same, ((0, 0), (0, 1))) & (batch["segment_ids"] > 0)
    return batch


@functools.cache
def sums_and_gradients(config):
    """A jitted function: batch -> (sums over tokens, gradient of their cross-entropy), with random parameters."""
    model = HybridLM(config, rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(model, nnx.Param)
    objective = NextToken(config)

    def cross_entropy(parameters, batch):
        sums = objective.sums(nnx.merge(graphdef, parameters), batch)
        return sums.cross_entropy, sums

    return functools.partial(jax.jit(jax.grad(cross_entropy, has_aux=True)), parameters)


@functools.cache
def sums_alone(config):
    """As `sums_and_gradients`, without the gradients."""
    graphdef, parameters = nnx.split(HybridLM(config, rngs=nnx.Rngs(0)), nnx.Param)
    return jax.jit(lambda batch: NextToken(config).sums(nnx.merge(graphdef, parameters), batch))


def in_precision(config, dtype):
    return dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype, logits_dtype=dtype)


def assert_equal(packed, alone, tolerance):
    for ours, theirs in zip(jax.tree.leaves(packed), jax.tree.leaves(alone), strict=True):
        scale = max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)


packings = st.tuples(
    *[st.lists(st.integers(1, T), min_size=0, max_size=DOCUMENTS // ROWS - 1, unique=True).map(sorted)] * ROWS,
    st.integers(0, 2**31),
)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("name", MODELS)
def test_packed_loss_and_gradients_equal_documents_alone(name, dtype, tolerance):
    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(packings)
    def check(packing):
        *cuts, seed = packing
        rng = np.random.default_rng(seed)
        lengths = [np.diff([0, *row]) for row in cuts]
        documents = [[rng.integers(0, MODEL.vocab_size, length) for length in row] for row in lengths]
        call = sums_and_gradients(in_precision(MODELS[name], dtype))
        gradients, sums = call(rows(documents, DOCUMENTS))
        gradients_alone, sums_alone = call(rows([[document] for row in documents for document in row], DOCUMENTS))
        assert_equal(sums, sums_alone, tolerance)
        assert_equal(gradients, gradients_alone, tolerance)

    with jax.enable_x64(dtype == "float64"):
        check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "experts"])
def test_packed_loss_equals_rows_without_padding_or_borders(name):
    """The documents alone, now as whole rows of their own length."""
    documents = [np.random.default_rng(n).integers(0, MODEL.vocab_size, n) for n in (65, 1, 84)]
    with jax.enable_x64(True):
        call = sums_alone(in_precision(MODELS[name], "float64"))
        packed = call(rows([documents], 1))
        alone = []
        for document in documents:
            whole = {key: value[:, : len(document)] for key, value in rows([[document]], 1).items()}
            alone.append(call(whole))
        assert_equal(packed, functools.reduce(functools.partial(jax.tree.map, jnp.add), alone), 1e-10)


def test_loss_of_micro_batches_equals_the_loss_of_their_batch():
    config = in_precision(MODELS["experts"], "float64")
    rng = np.random.default_rng(0)
    documents = [[rng.integers(0, MODEL.vocab_size, length) for length in row] for row in ([70, 20], [150], [3], [90])]
    with jax.enable_x64(True):
        whole = sums_alone(config)(rows(documents, 4))
        first, second = (sums_alone(config)(rows(part, 2)) for part in (documents[:2], documents[2:]))
        objective = NextToken(config)
        ours, metrics = objective.loss(jax.tree.map(jnp.add, first, second))
        expected, _ = objective.loss(whole)
        np.testing.assert_allclose(ours, expected, rtol=1e-12)
        assert metrics["targets"] == 69 + 19 + 149 + 2 + 89
        assert metrics["expert_load"].shape == (2, 4)
        np.testing.assert_allclose(metrics["expert_load"].mean(axis=1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"] + metrics["auxiliary_loss"], ours)
        assert metrics["expert_load_max"] >= 1 >= metrics["expert_load_min"]
        assert metrics["dropped_fraction"] == 0


def test_a_batch_of_padding_has_no_loss():
    for name in ("hybrid", "experts"):
        sums = sums_alone(MODELS[name])(rows([], 1))
        assert NextToken(MODELS[name]).loss(sums)[0] == 0


def test_a_stages_rope_theta_replaces_the_models():
    batch = rows([[np.arange(24)]], 1)
    model = HybridLM(MODEL, rngs=nnx.Rngs(0))
    longer = dataclasses.replace(MODEL, rope_theta=1e6)
    elsewhere = HybridLM(longer, rngs=nnx.Rngs(0))
    ours, expected, without = (
        jax.jit(lambda batch, objective=objective, model=model: objective.sums(model, batch).cross_entropy)(batch)
        for objective, model in (
            (NextToken(MODEL, rope_theta=1e6), model),
            (NextToken(longer), elsewhere),
            (NextToken(MODEL), model),
        )
    )
    assert ours == expected
    assert ours != without
