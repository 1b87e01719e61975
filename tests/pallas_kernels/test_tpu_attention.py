"""The TPU kernels, interpreted: equal to the recurrence, at home in every transformation, free of races."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # says whether races were found
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from lightning_cases import (
    assert_bf16_costs_only_rounding,
    assert_close,
    by_jax,
    by_loops,
    of_magnitudes,
    race_options,
    random_case,
)

from pallas_kernels import lightning_attention
from pallas_kernels.tpu import attention as tpu
from pallas_kernels.tpu import chunk as chunks
from pallas_kernels.tpu.backward import backward
from pallas_kernels.tpu.block_sizes import BlockSizes
from pallas_kernels.tpu.chunk import find_borders
from pallas_kernels.tpu.forward import forward

attention = partial(lightning_attention, implementation="pallas_tpu")
on_tpu = partial(by_jax, implementation="pallas_tpu")


@pytest.fixture
def interpreted():
    """Kernels run as XLA loops over their grid; what a block reads beyond its array is NaN."""
    with pltpu.force_tpu_interpret_mode(True):
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("length", "chunk_size", "borders"),
    [(32, 8, None), (37, 8, 4), (5, 64, 2), (1, None, None), (70, 64, None)],
)
def test_fp32_equals_the_recurrence(length, chunk_size, borders):
    case = random_case(length, borders=borders)
    assert_close(on_tpu(case, jnp.float32, chunk_size=chunk_size), by_loops(case), 1e-6)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("key_dim", "heads", "sizes"),
    [(64, 5, (128, 2, 4)), (96, 5, (128, 4, 4)), (128, 3, (64, 2, 1)), (256, 2, (128, 1, 1))],
)
def test_every_head_dim_equals_the_recurrence(key_dim, heads, sizes, monkeypatch):
    """Heads that do not fill the last block, tokens that do not fill the last chunk."""
    monkeypatch.setattr(tpu, "choose_block_sizes", lambda *_: BlockSizes(*sizes))
    slopes = (0.0, 0.92, 0.03, 0.2, 0.004)[:heads]
    case = random_case(150, batch=1, key_dim=key_dim, value_dim=key_dim, slopes=slopes, borders=3)
    assert_close(on_tpu(case, jnp.float32), by_loops(case), 1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("dim", "borders"),
    [(64, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((64, None), (96, 3), (128, None), (256, 3)))],
)
def test_bf16_costs_no_more_than_twice_the_rounding_of_its_result(dim, borders):
    case = random_case(300, batch=1, key_dim=dim, value_dim=dim, borders=borders)
    assert_bf16_costs_only_rounding(case, implementation="pallas_tpu", chunk_size=64)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("slope", [50.0, 1e4])
def test_huge_decays_stay_finite_and_exact(slope):
    case = random_case(40, slopes=(slope, 0.0), borders=3)
    assert_close(on_tpu(case, jnp.float32, chunk_size=16), by_loops(case), 1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 60),
    key_dim=st.integers(1, 16),
    value_dim=st.integers(1, 16),
    heads=st.integers(1, 3),
    chunk_size=st.sampled_from([8, 16, 24]),
    documents=st.booleans(),
    seed=st.integers(0, 2**32 - 4),
)
def test_random_shapes_and_documents_equal_the_recurrence(
    batch, length, key_dim, value_dim, heads, chunk_size, documents, seed
):
    """200 cases: 50 shapes, each compiled once for 4 draws of inputs, decays and borders."""
    for draw in range(4):
        rng = np.random.default_rng(seed + draw)
        case = random_case(
            length,
            batch=batch,
            key_dim=key_dim,
            value_dim=value_dim,
            slopes=rng.choice([0.0, 0.001, 0.05, 0.3, 0.92], heads),
            borders=rng.choice([0.5, 3, 20]) if documents else None,
            seed=seed + draw,
        )
        assert_close(on_tpu(case, jnp.float32, chunk_size=chunk_size), by_loops(case), 1e-5, of_magnitudes(case))


def test_a_simulated_tpu_equals_the_recurrence(monkeypatch):
    """Copies between memories are simulated, memory that was not written is NaN, and reads out of bounds raise."""
    monkeypatch.setattr(tpu, "choose_block_sizes", lambda *_: BlockSizes(8, 2, 2))
    case = random_case(21, batch=1, slopes=(0.1, 0.92, 0.0), borders=2)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        assert_close(on_tpu(case, jnp.float32), by_loops(case), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_races_are_found_where_planted_and_only_there(direction, planted, monkeypatch):
    """The planted race: two cores share out three rows of two chunks, so that the second row's are on both."""
    if planted:
        monkeypatch.setattr(chunks, "DIMENSION_SEMANTICS", ("parallel", "parallel", "parallel"))
    batch, length, heads, dim, chunk = 3, 12, 2, 8, 8
    x = jnp.ones((batch, length, heads * dim))
    state = jnp.ones((batch, heads, dim, dim))
    borders = find_borders(jnp.zeros((batch, length), jnp.int32), chunk)
    log_decay = jnp.full(heads, -0.1)
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(num_cores_or_threads=2, **race_options(pltpu.InterpretParams))
    ):
        if direction == "forward":
            results = forward(x, x, x, log_decay, borders, state, chunk=chunk, heads=2, save_states=True)
        else:
            states = jnp.ones((batch, 2, heads, dim, dim))
            results = backward(x, x, x, log_decay, borders, states, x, state, chunk=chunk, heads=2)
        jax.block_until_ready(results)
    assert interpreter.races.races_found == planted
    pltpu.reset_tpu_interpret_mode_state()


def assert_equal_gradients(function, oracle, *arguments):
    """Of the sum of sines of what two functions return, in all arguments."""

    def gradients(f):
        loss = jax.jit(jax.grad(lambda *x: jnp.sin(f(*x)).sum(), argnums=tuple(range(len(arguments)))))
        return loss(*arguments)

    for x, y in zip(gradients(function), gradients(oracle), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.abs(y).max())


def inputs(case):
    return [jnp.asarray(0.3 * x, jnp.float32) for x in (case.q, case.k, case.v)]


@pytest.mark.usefixtures("interpreted")
def test_log_decay_gets_no_gradient():
    case = random_case(10)
    gradient = jax.grad(lambda log_decay: attention(*inputs(case), log_decay).sum())
    assert not gradient(jnp.asarray(case.log_decay, jnp.float32)).any()


@pytest.mark.usefixtures("interpreted")
def test_vmap_equals_a_batch():
    case = random_case(20, batch=6, borders=3)
    ids = jnp.asarray(case.segment_ids)

    def mapped(*x):
        def one(q, k, v, ids):
            return attention(q, k, v, case.log_decay, segment_ids=ids, chunk_size=8)

        o = jax.vmap(one)(*(y.reshape(3, 2, *y.shape[1:]) for y in (*x, ids)))
        return o.reshape(6, *o.shape[2:])

    def oracle(*x):
        return lightning_attention(*x, case.log_decay, segment_ids=ids, implementation="xla")

    assert_equal_gradients(mapped, oracle, *inputs(case))


@pytest.mark.usefixtures("interpreted")
def test_layers_scanned_under_remat_equal_layers_unrolled():
    case = random_case(20, key_dim=6, value_dim=6, borders=3)
    decays_LH = jnp.asarray(case.log_decay, jnp.float32) * jnp.array([[1.0], [0.5], [0.1]])

    def layer(implementation, x, log_decay):
        o = lightning_attention(
            x,
            x,
            x,
            log_decay,
            segment_ids=jnp.asarray(case.segment_ids),
            chunk_size=8,
            implementation=implementation,
        )
        return jnp.tanh(o), None

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(partial(layer, "pallas_tpu")), x, decays_LH)[0]

    def unrolled(x):
        for log_decay in decays_LH:
            x, _ = layer("xla", x, log_decay)
        return x

    assert_equal_gradients(scanned, unrolled, inputs(case)[0])


def over_rows_and_heads(chunk_size, *, check_vma):
    """(q, k, v, log_decay, segment_ids) -> o over eight devices."""
    by_head = PartitionSpec("data", None, "tensor")
    return jax.shard_map(
        lambda q, k, v, log_decay, ids: attention(q, k, v, log_decay, segment_ids=ids, chunk_size=chunk_size),
        mesh=Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor")),
        in_specs=(by_head, by_head, by_head, PartitionSpec("tensor"), PartitionSpec("data")),
        out_specs=by_head,
        check_vma=check_vma,
    )


@pytest.mark.usefixtures("interpreted")
def test_shard_map_over_batch_and_heads_equals_one_device():
    case = random_case(20, key_dim=5, borders=3)
    ids = jnp.asarray(case.segment_ids)
    log_decay = jnp.asarray(case.log_decay, jnp.float32)
    sharded = over_rows_and_heads(8, check_vma=False)  # which the interpreter cannot check
    assert_equal_gradients(
        lambda *x: sharded(*x, log_decay, ids),
        lambda *x: lightning_attention(*x, log_decay, segment_ids=ids, implementation="xla"),
        *inputs(case),
    )


def test_shard_map_checks_what_varies_over_the_mesh():
    """As far as the program for TPUs, forward and backward."""
    x = jax.ShapeDtypeStruct((2, 300, 4, 128), jnp.bfloat16)
    log_decay, ids = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((2, 300), jnp.int32)
    sharded = over_rows_and_heads(None, check_vma=True)
    gradient = jax.grad(lambda *inputs: sharded(*inputs).sum(), argnums=(0, 1, 2))
    lowered = jax.jit(gradient).trace(x, x, x, log_decay, ids).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
