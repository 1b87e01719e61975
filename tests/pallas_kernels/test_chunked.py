"""The chunked form: equal to the recurrence everywhere, linear in memory, and at home in every transformation."""

import itertools
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lightning_cases import (
    DECAYS,
    Case,
    Results,
    assert_bf16_costs_only_rounding,
    assert_close,
    by_jax,
    by_loops,
    random_case,
)

from pallas_kernels import lightning_attention

property_test = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def assert_equals_recurrence(case: Case, chunk_size: int | None):
    expected = by_loops(case)
    assert_close(by_jax(case, jnp.float32, chunk_size=chunk_size), expected, 1e-6)
    with jax.enable_x64(True):
        assert_close(by_jax(case, jnp.float64, chunk_size=chunk_size), expected, 1e-12)


@pytest.mark.parametrize("borders", [None, 5])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
def test_every_length_equals_the_recurrence(length, borders):
    assert_equals_recurrence(random_case(length, borders=borders), None)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 100, 4096])
def test_every_chunk_size_equals_the_recurrence(chunk_size):
    assert_equals_recurrence(random_case(101, borders=5), chunk_size)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (16, 3), (3, 16), (64, 64)])
def test_every_head_dim_equals_the_recurrence(key_dim, value_dim):
    assert_equals_recurrence(random_case(70, key_dim=key_dim, value_dim=value_dim, borders=3), 32)


@property_test
@given(border_bits=st.integers(0, 2**23 - 1), first_id=st.integers(0, 2))
def test_packed_documents_equal_documents_alone(border_bits, first_id):
    """24 tokens with any set of borders; ids come back; the initial state reaches the first document only."""
    borders = [t for t in range(1, 24) if border_bits >> (t - 1) & 1]
    ids = (np.searchsorted(borders, np.arange(24), side="right") + first_id) % 3
    case = random_case(24, batch=1)._replace(segment_ids=ids[None].astype(np.int32))
    with jax.enable_x64(True):
        packed = by_jax(case, jnp.float64, chunk_size=8)

    zeros = np.zeros_like(case.initial_state)
    edges = [0, *borders, 24]
    alone = []
    for begin, end in itertools.pairwise(edges):
        q, k, v, do = (x[:, begin:end] for x in (case.q, case.k, case.v, case.do))
        initial_state = case.initial_state if begin == 0 else zeros
        d_final_state = case.d_final_state if end == 24 else zeros
        alone.append(by_loops(Case(q, k, v, initial_state, case.log_decay, None, do, d_final_state)))
    o, dq, dk, dv = (np.concatenate([getattr(r, name) for r in alone], axis=1) for name in ("o", "dq", "dk", "dv"))
    assert_close(packed, Results(o, alone[-1].final_state, dq, dk, dv, alone[0].d_initial_state), 1e-12)


@partial(jax.jit, static_argnames="split")
def in_two_calls(q, k, v, initial_state, log_decay, segment_ids, do, d_final_state, carry, split):
    def attention(q, k, v, state):
        outputs = []
        for part, scale in ((slice(None, split), 1), (slice(split, None), carry)):
            o, state = lightning_attention(
                q[:, part],
                k[:, part],
                v[:, part],
                log_decay,
                segment_ids=segment_ids[:, part],
                initial_state=scale * state,
                return_final_state=True,
                chunk_size=8,
            )
            outputs.append(o)
        return jnp.concatenate(outputs, axis=1), state

    outputs, pull_back = jax.vjp(attention, q, k, v, initial_state)
    return Results(*outputs, *pull_back((do, d_final_state)))


@property_test
@given(split=st.sampled_from([1, 8, 13]), border=st.integers(1, 23))
def test_a_sequence_split_anywhere_equals_one_call(split, border):
    """The state handed from one call to the next, and its gradient handed back, leave no trace of the split."""
    case = random_case(24, batch=1)._replace(segment_ids=(np.arange(24) >= border).astype(np.int32)[None])
    carry = 0.0 if border == split else 1.0  # a border between two calls is for the caller to see
    with jax.enable_x64(True):
        assert_close(in_two_calls(*case, carry, split=split), by_loops(case), 1e-12)


@pytest.mark.parametrize("slope", [50.0, 1e4])
def test_huge_decays_stay_finite_and_exact(slope):
    case = random_case(150, slopes=(slope, 0.0), borders=3)
    results = by_jax(case, jnp.float32)
    assert all(np.isfinite(x).all() for x in results)
    assert_close(results, by_loops(case), 1e-6)


def test_bf16_costs_no_more_than_twice_the_rounding_of_its_result():
    assert_bf16_costs_only_rounding(random_case(1024, batch=1, key_dim=64, value_dim=64, borders=2))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_log_decay_gets_no_gradient(implementation):
    case = random_case(10)
    q, k, v, log_decay = (jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v, case.log_decay))
    gradient = jax.grad(lambda log_decay: lightning_attention(q, k, v, log_decay, implementation=implementation).sum())
    assert not gradient(log_decay).any()


def test_vmap_equals_a_loop_of_calls():
    cases = [random_case(20, borders=3, seed=seed) for seed in range(3)]
    stacked = [jnp.stack([jnp.asarray(getattr(c, name)) for c in cases]) for name in ("q", "k", "v", "segment_ids")]

    def loss(q, k, v, ids):
        return jnp.sin(lightning_attention(q, k, v, cases[0].log_decay, segment_ids=ids, chunk_size=8)).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    mapped = jax.jit(jax.vmap(gradients))(*stacked)
    for n in range(len(cases)):
        single = gradients(*(x[n] for x in stacked))
        for x, y in zip(mapped, single, strict=True):
            np.testing.assert_allclose(x[n], y, rtol=0, atol=1e-6 * np.abs(y).max())


def test_layers_scanned_under_remat_equal_layers_unrolled():
    case = random_case(20, key_dim=6, value_dim=6, borders=3)
    scales = jnp.linspace(0.5, 1.5, 3)

    def layer(x, scale):
        o = lightning_attention(
            scale * x, x, x, case.log_decay, segment_ids=jnp.asarray(case.segment_ids), chunk_size=8
        )
        return jnp.tanh(o), None

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(layer), x, scales)[0].sum()

    def unrolled(x):
        for scale in scales:
            x, _ = layer(x, scale)
        return x.sum()

    x = jnp.asarray(case.q, jnp.float32)
    expected = jax.jit(jax.grad(unrolled))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_sharding_over_batch_and_heads_needs_no_communication():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    case = random_case(40, borders=3)
    q, k, v = (
        jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
        for x in (case.q, case.k, case.v)
    )
    ids = jax.device_put(case.segment_ids, NamedSharding(mesh, PartitionSpec("data")))

    def gradients(q, k, v, ids):
        def loss(q, k, v):
            return jnp.sin(lightning_attention(q, k, v, case.log_decay, segment_ids=ids, chunk_size=16))

        o, pull_back = jax.vjp(loss, q, k, v)
        return o, *pull_back(o)

    compiled = jax.jit(gradients).lower(q, k, v, ids).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in compiled.as_text()
    one_device = jax.jit(gradients)(*(jnp.asarray(np.asarray(x)) for x in (q, k, v, ids)))
    for x, y in zip(compiled(q, k, v, ids), one_device, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_shard_map_equals_one_device(implementation):
    case = random_case(20, key_dim=5, borders=3)
    attention = partial(lightning_attention, chunk_size=8, implementation=implementation)
    by_head = PartitionSpec("data", None, "tensor")
    sharded = jax.shard_map(
        lambda q, k, v, log_decay, ids: attention(q, k, v, log_decay, segment_ids=ids),
        mesh=Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor")),
        in_specs=(by_head, by_head, by_head, PartitionSpec("tensor"), PartitionSpec("data")),
        out_specs=by_head,
    )
    q, k, v, log_decay = (jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v, case.log_decay))
    ids = jnp.asarray(case.segment_ids)

    def gradients(f):
        return jax.jit(jax.grad(lambda q, k, v: jnp.sin(f(q, k, v)).sum(), argnums=(0, 1, 2)))(q, k, v)

    expected = gradients(lambda q, k, v: attention(q, k, v, log_decay, segment_ids=ids))
    for x, y in zip(gradients(lambda q, k, v: sharded(q, k, v, log_decay, ids)), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())


def test_the_exported_forward_gives_the_same_bits():
    case = random_case(70, borders=3)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v))

    @jax.jit
    def forward(q, k, v, ids):
        return lightning_attention(q, k, v, case.log_decay, segment_ids=ids)

    exported = jax.export.export(forward)(q, k, v, case.segment_ids)
    np.testing.assert_array_equal(exported.call(q, k, v, case.segment_ids), forward(q, k, v, case.segment_ids))


def test_memory_of_forward_and_backward_is_linear_in_length():
    def gradient(q, k, v):
        return jax.grad(lambda *x: lightning_attention(*x, -np.array(DECAYS)).sum(), argnums=(0, 1, 2))(q, k, v)

    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, len(DECAYS), 16), jnp.float32)
        return jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16384) <= 4.2 * temporary_bytes(4096)
