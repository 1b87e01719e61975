"""Causal softmax attention: every implementation against the formula in numpy, documents apart, groups of heads.

Shapes: B batch, T sequence, H query heads, G key/value heads, K head dim.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightning_jax.models.softmax_attention import softmax_attention

property_test = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def random_inputs(length, *, batch=2, heads=4, groups=2, dim=8, borders=None, seed=0):
    """(q, k, v, do) in fp64 and segment ids that come back, or None without `borders` expected per row."""
    rng = np.random.default_rng(seed)
    q, do = rng.standard_normal((2, batch, length, heads, dim))
    k, v = rng.standard_normal((2, batch, length, groups, dim))
    ids = None
    if borders is not None:
        ids = (np.cumsum(rng.random((batch, length)) < borders / length, axis=1) % 3).astype(np.int32)
    return (q, k, v, do), ids


def by_formula(q, k, v, do, ids):
    """(o, dq, dk, dv) from the whole [T, T] in fp64; a document is a run of equal ids."""
    batch, length, heads, dim = q.shape
    ratio = heads // k.shape[2]
    k, v = (np.repeat(x, ratio, axis=2) for x in (k, v))
    visible = np.tril(np.ones((length, length), bool))[None].repeat(batch, axis=0)
    if ids is not None:
        for row, i, j in np.argwhere(visible):
            visible[row, i, j] = (ids[row, j : i + 1] == ids[row, i]).all()
    scores = np.where(visible[:, None], np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(dim), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("bihk,bjhk->bhij", do, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(dim)
    dk, dv = np.einsum("bhij,bihk->bjhk", d_scores, q), np.einsum("bhij,bihk->bjhk", weights, do)
    dk, dv = (x.reshape(batch, length, -1, ratio, dim).sum(3) for x in (dk, dv))
    return np.einsum("bhij,bjhk->bihk", weights, v), np.einsum("bhij,bjhk->bihk", d_scores, k), dk, dv


@partial(jax.jit, static_argnames="implementation")
def _run(q, k, v, do, ids, implementation):
    attention = partial(softmax_attention, segment_ids_BT=ids, implementation=implementation)
    o, pull_back = jax.vjp(attention, q, k, v)
    return o, *pull_back(do)


def by_jax(arrays, ids, dtype, implementation="blocked"):
    return _run(*(jnp.asarray(x, dtype) for x in arrays), ids, implementation)


def assert_close(actual, expected, tolerance):
    """Every difference is at most `tolerance` times the largest magnitude of its array, at least 1."""
    for name, x, y in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        difference = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max() / max(np.abs(y).max(), 1)
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize("borders", [None, 4])
@pytest.mark.parametrize("implementation", ["xla", "blocked", "auto"])
def test_every_implementation_equals_the_formula(implementation, borders):
    arrays, ids = random_inputs(70, borders=borders)
    assert_close(by_jax(arrays, ids, jnp.float32, implementation), by_formula(*arrays, ids), 2e-6)


@pytest.mark.parametrize("borders", [None, 5])
@pytest.mark.parametrize("length", [1, 5, 64, 65, 200, 550])
def test_blocks_equal_the_formula_in_fp64(length, borders):
    arrays, ids = random_inputs(length, batch=1, borders=borders)
    with jax.enable_x64(True):
        assert_close(by_jax(arrays, ids, jnp.float64), by_formula(*arrays, ids), 1e-12)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_query_heads_read_their_group(heads, groups):
    arrays, ids = random_inputs(70, heads=heads, groups=groups, borders=2)
    with jax.enable_x64(True):
        assert_close(by_jax(arrays, ids, jnp.float64), by_formula(*arrays, ids), 1e-12)


@property_test
@given(borders=st.sets(st.integers(1, 149), max_size=8), first_id=st.integers(0, 2))
def test_packed_documents_equal_documents_alone(borders, first_id):
    """150 tokens in three blocks; ids come back."""
    edges = [0, *sorted(borders), 150]
    ids = ((np.searchsorted(edges[1:-1], np.arange(150), side="right") + first_id) % 3).astype(np.int32)[None]
    arrays, _ = random_inputs(150, batch=1)
    alone = [by_formula(*(x[:, begin:end] for x in arrays), None) for begin, end in itertools.pairwise(edges)]
    expected = [np.concatenate(parts, axis=1) for parts in zip(*alone, strict=True)]
    with jax.enable_x64(True):
        assert_close(by_jax(arrays, ids, jnp.float64), expected, 1e-12)


def test_scores_far_apart_stay_finite_and_exact():
    (q, k, v, do), ids = random_inputs(70, borders=3)
    arrays = (1e3 * q, k, v, do)
    with jax.enable_x64(True):
        assert_close(by_jax(arrays, ids, jnp.float64), by_formula(*arrays, ids), 1e-11)
    assert all(np.isfinite(x).all() for x in by_jax(arrays, ids, jnp.float32))


def test_bf16_blocks_cost_no_more_than_three_times_the_rounding_of_their_result():
    arrays, ids = random_inputs(300, dim=64, borders=2)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays]
    results = by_jax(rounded, ids, jnp.bfloat16)
    for actual, exact in zip(results, by_formula(*rounded, ids), strict=True):
        assert actual.dtype == jnp.bfloat16
        rounding = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact
        assert np.linalg.norm(np.asarray(actual, np.float64) - exact) <= 3 * np.linalg.norm(rounding)


def test_layers_scanned_under_remat_equal_layers_unrolled():
    (q, *_), ids = random_inputs(70, groups=4, borders=3)
    scales = jnp.linspace(0.5, 1.5, 3)

    def layer(x, scale):
        return jnp.tanh(softmax_attention(scale * x, x, x, segment_ids_BT=jnp.asarray(ids))), None

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(layer), x, scales)[0].sum()

    def unrolled(x):
        for scale in scales:
            x, _ = layer(x, scale)
        return x.sum()

    x = jnp.asarray(q, jnp.float32)
    expected = jax.jit(jax.grad(unrolled))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_sharding_over_batch_and_heads_moves_no_activations():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    (q, k, v, do), ids = random_inputs(70, heads=8, groups=4, borders=3)
    by_head = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    arrays = [jax.device_put(jnp.asarray(x, jnp.float32), by_head) for x in (q, k, v, do)]
    placed_ids = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
    compiled = _run.lower(*arrays, placed_ids, "blocked").compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text
    # The one thing devices agree on is where the earliest document of each block of queries begins.
    assert all("s32" in line for line in text.splitlines() if "all-reduce(" in line)
    assert_close(compiled(*arrays, placed_ids), by_jax((q, k, v, do), ids, jnp.float32), 1e-6)


def test_shard_map_equals_one_device():
    (q, k, v, do), ids = random_inputs(70, heads=8, groups=4, borders=3)
    by_head, by_row = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    sharded = jax.shard_map(
        lambda *x: _run(*x, "blocked"),
        mesh=Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor")),
        in_specs=(by_head, by_head, by_head, by_head, by_row),
        out_specs=(by_head,) * 4,
    )
    results = jax.jit(sharded)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, do)), ids)
    assert_close(results, by_jax((q, k, v, do), ids, jnp.float32), 1e-6)


def test_memory_of_blocks_is_linear_in_length():
    def gradient(q, k, v):
        return jax.grad(lambda *x: softmax_attention(*x, implementation="blocked").sum(), argnums=(0, 1, 2))(q, k, v)

    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        return jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(32768) <= 4.2 * temporary_bytes(8192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_BTHK": jnp.ones((6, 4, 8))}, r"q has shape \(6, 4, 8\); it must be \[B, T, H, K\]"),
        ({"k_BTGK": jnp.ones((2, 6, 3, 8))}, r"k has shape \(2, 6, 3, 8\); .* G dividing 4"),
        ({"v_BTGK": jnp.ones((2, 6, 4, 8))}, r"v has shape \(2, 6, 4, 8\); it must be k's, \(2, 6, 2, 8\)"),
        ({"v_BTGK": jnp.ones((2, 6, 2, 8), jnp.bfloat16)}, "float32, float32, bfloat16; they must all be"),
        ({"segment_ids_BT": jnp.ones((2, 5), int)}, r"segment_ids has shape \(2, 5\); it must be \[B, T\] = \(2, 6\)"),
        ({"implementation": "flash"}, "implementation is 'flash'; it must be one of"),
        ({"implementation": "cudnn"}, "'cudnn' cannot run: it needs an NVIDIA GPU"),
    ],
)
def test_each_mistake_is_one_line(changes, message):
    arguments = {"q_BTHK": jnp.ones((2, 6, 4, 8)), "k_BTGK": jnp.ones((2, 6, 2, 8)), "v_BTGK": jnp.ones((2, 6, 2, 8))}
    with pytest.raises(ValueError, match=message) as error:
        softmax_attention(**arguments | changes)
    assert "\n" not in str(error.value)
