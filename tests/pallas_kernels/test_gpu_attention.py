"""The GPU kernels, interpreted: equal to the recurrence, at home in every transformation, free of races."""

from functools import partial

import jax
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


def plan_of(monkeypatch, warpgroups, pieces):
    monkeypatch.setattr(gpu, "choose_plan", lambda batch, length, *_: Plan(length, warpgroups, pieces))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("length", "head_dim", "warpgroups", "pieces", "borders"),
    [(128, 64, 1, 1, None), (200, 128, 2, 1, 3), (77, 96, 2, 1, 4), (330, 128, 1, 3, 5), (5, 64, 1, 1, 2)],
)
def test_bf16_costs_no_more_than_twice_the_rounding_of_its_result(
    length, head_dim, warpgroups, pieces, borders, monkeypatch
):
    plan_of(monkeypatch, warpgroups, pieces)
    case = random_case(length, batch=1, key_dim=head_dim, value_dim=head_dim, slopes=(0.004, 0.92), borders=borders)
    assert_bf16_costs_only_rounding(case, implementation="pallas_gpu")
