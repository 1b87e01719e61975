"""The GPU kernels, interpreted: equal to the recurrence, at home in every transformation, free of races."""

from functools import partial

import jax
import numpy as np
import pytest
from lightning_cases import assert_bf16_costs_only_rounding, by_jax, random_case

from pallas_kernels import lightning_attention
from pallas_kernels.gpu.plans import OLDEST_JAX, Plan

if jax.__version_info__[:2] < OLDEST_JAX:
    pytest.skip("the GPU kernels need jax 0.11 or newer", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import attention as gpu

attention = partial(lightning_attention, implementation="pallas_gpu")
on_gpu = partial(by_jax, implementation="pallas_gpu")


@pytest.fixture
def interpreted():
    """Warpgroups run as threads; copies between memories are simulated; memory that was not written is NaN."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def plan_of(monkeypatch, columns, pieces):
    monkeypatch.setattr(gpu, "choose_plan", lambda batch, length, *_: Plan(length, columns, pieces))


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
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_and_documents_equal_the_recurrence(seed, monkeypatch):
    """Two heads of each of 12 draws; `random_layouts` runs as many as wanted on a GPU."""
    rng = np.random.default_rng(seed)
    length, head_dim = int(rng.integers(1, 200)), int(rng.choice([64, 96]))
    plan_of(monkeypatch, 32, int(rng.integers(1, 1 + -(-length // 64))))
    case = random_case(
        length,
        batch=1,
        key_dim=head_dim,
        value_dim=head_dim,
        slopes=rng.choice([0.0, 0.001, 0.05, 0.3, 0.92], 2),
        borders=rng.choice([None, 0.5, 3, 20]),
        seed=seed,
    )
    assert_bf16_costs_only_rounding(case, implementation="pallas_gpu")
