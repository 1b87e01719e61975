"""The GPU kernels, interpreted: equal to the recurrence, at home in every transformation, free of races."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning_cases import assert_bf16_costs_only_rounding, race_options, random_case

from pallas_kernels import lightning_attention
from pallas_kernels.gpu.plans import OLDEST_JAX, Plan, Plans

if jax.__version_info__[:2] < OLDEST_JAX:
    pytest.skip("the GPU kernels need jax 0.11 or newer", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter  # says whether races were found
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import attention as gpu
from pallas_kernels.gpu import chunk as chunks
from pallas_kernels.gpu.backward import reverse_sweep
from pallas_kernels.gpu.chunk import find_borders
from pallas_kernels.gpu.forward import sweep

attention = partial(lightning_attention, implementation="pallas_gpu")


@pytest.fixture
def interpreted():
    """Warpgroups run as threads; copies between memories are simulated; memory that was not written is NaN."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def plan_of(monkeypatch, columns, pieces):
    """These columns and pieces; dk and dv in one sweep unless they are of 256 columns."""

    def plans(batch, length, heads, head_dim):
        reverse = Plan(length, 32 if head_dim == 64 else 64, pieces)
        return Plans(Plan(length, columns, pieces), reverse if head_dim <= 128 else None)

    monkeypatch.setattr(gpu, "choose_plans", plans)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("length", "head_dim", "columns", "pieces", "borders"),
    [
        (128, 64, 32, 1, None),
        (5, 64, 32, 1, 2),
        pytest.param(77, 96, 64, 1, 4, marks=pytest.mark.slow),
        pytest.param(200, 128, 64, 1, 3, marks=pytest.mark.slow),
        pytest.param(70, 256, 32, 1, 3, marks=pytest.mark.slow),
        pytest.param(330, 64, 32, 3, 5, marks=pytest.mark.slow),
    ],
)
def test_bf16_costs_no_more_than_twice_the_rounding_of_its_result(
    length, head_dim, columns, pieces, borders, monkeypatch
):
    plan_of(monkeypatch, columns, pieces)
    case = random_case(length, batch=1, key_dim=head_dim, value_dim=head_dim, slopes=(0.004, 0.92), borders=borders)
    assert_bf16_costs_only_rounding(case, implementation="pallas_gpu")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("slope", [50.0, pytest.param(1e4, marks=pytest.mark.slow)])
def test_huge_decays_stay_finite_and_exact(slope):
    case = random_case(70, batch=1, key_dim=64, value_dim=64, slopes=(slope,), borders=3)
    assert_bf16_costs_only_rounding(case, implementation="pallas_gpu")


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("pieces", [1, 2])
@settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    length=st.integers(1, 129),
    head_dim=st.sampled_from([64, 64, 64, 96, 128]),
    slope=st.sampled_from([0.0, 0.001, 0.05, 0.3, 0.92]),
    borders=st.sampled_from([0.5, 3, 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_shapes_and_documents_equal_the_recurrence(pieces, length, head_dim, slope, borders, seed):
    """200 layouts: ten shapes, each of 20 rows with documents of their own."""
    options = {"key_dim": head_dim, "value_dim": head_dim, "slopes": (slope,), "borders": borders, "seed": seed}
    with pytest.MonkeyPatch.context() as monkeypatch:
        plan_of(monkeypatch, 32, min(pieces, -(-length // 64)))
        assert_bf16_costs_only_rounding(random_case(length, batch=20, **options), implementation="pallas_gpu")


@pytest.mark.parametrize("planted", [None, "commit_smem", "wait_smem_to_gmem", "barrier_wait"])
@pytest.mark.parametrize("kernel", ["sweep", "reverse_sweep"])
def test_races_are_found_where_planted_and_only_there(kernel, planted, monkeypatch):
    """Planted: a missing fence between writes and copies, a missing wait for copies out, and for copies in.

    The interpreter's matmuls are synchronous and not watched.
    """
    monkeypatch.setattr(chunks, "MOST_STAGES", 2)
    if planted:
        monkeypatch.setattr(plgpu, planted, lambda *_, **__: None)
    length = 256
    x = jnp.ones((1, length, 1, 64), jnp.bfloat16)
    operands = jnp.array([-0.1]), find_borders(jnp.zeros((1, length), jnp.int32)), jnp.zeros((1, 1, 1, 64, 64))
    # Where waits are missing, barriers are left in a state that the interpreter raises on, races or not.
    checks = contextlib.suppress(jax.errors.JaxRuntimeError) if planted else contextlib.nullcontext()
    watched = plgpu.InterpretGPUParams(**race_options(plgpu.InterpretGPUParams))
    with checks, plgpu.force_gpu_interpret_mode(watched):
        plan = Plan(length, 32, 1)
        if kernel == "sweep":
            results = sweep(x, x, x, *operands, plan=plan, reverse=True)
        else:
            results = reverse_sweep(x, x, x, x, *operands, plan=plan)
        jax.block_until_ready(results)
    assert interpreter.get_races().races_found == bool(planted)
    interpreter.reset_gpu_interpret_mode_state()


def inputs(case):
    return [jnp.asarray(x, jnp.bfloat16) for x in (case.q, case.k, case.v)]


def assert_same_gradients(function, oracle, *arguments):
    """Bit by bit: both run the same kernels."""

    def gradients(f):
        def loss(*x):
            return jnp.sin(f(*x).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)

    for x, y in zip(jax.tree.leaves(gradients(function)), jax.tree.leaves(gradients(oracle)), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.usefixtures("interpreted")
def test_vmap_equals_a_batch():
    case = random_case(70, batch=2, key_dim=64, value_dim=64, slopes=(0.1,), borders=3)
    ids = jnp.asarray(case.segment_ids)

    def mapped(*x):
        def one(q, k, v, ids):
            return attention(q[None], k[None], v[None], case.log_decay, segment_ids=ids[None])[0]

        return jax.vmap(one)(*x, ids)

    assert_same_gradients(mapped, lambda *x: attention(*x, case.log_decay, segment_ids=ids), *inputs(case))


@pytest.mark.usefixtures("interpreted")
def test_scanned_layers_equal_layers_unrolled():
    """Under remat as well they are lowered in test_gpu_compile.py; the interpreter has effects that remat refuses."""
    case = random_case(70, batch=1, key_dim=64, value_dim=64, slopes=(0.1,))
    decays_LH = jnp.array([[-0.1], [-0.01]])

    q, k, v = inputs(case)

    def layer(x, log_decay):
        return attention(x, k, v, log_decay), None

    def scanned(x):
        return jax.lax.scan(layer, x, decays_LH)[0]

    def unrolled(x):
        for log_decay in decays_LH:
            x, _ = layer(x, log_decay)
        return x

    assert_same_gradients(scanned, unrolled, q)


@pytest.mark.usefixtures("interpreted")
def test_log_decay_gets_no_gradient():
    case = random_case(10, batch=1, key_dim=64, value_dim=64, slopes=(0.1,))
    gradient = jax.grad(lambda log_decay: attention(*inputs(case), log_decay).astype(jnp.float32).sum())
    assert not gradient(jnp.asarray(case.log_decay, jnp.float32)).any()
