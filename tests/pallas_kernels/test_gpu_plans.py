"""How the GPU kernels share out the work: no multiprocessor idle, no piece empty, words for what cannot be."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.gpu import plans
from pallas_kernels.gpu.plans import CHUNK, MULTIPROCESSORS, WARPGROUPS, choose_plans


def blocks(plan, rows, dim):
    return rows * plan.pieces * -(-dim // (WARPGROUPS * plan.columns))


@pytest.mark.parametrize("dim", plans.HEAD_DIMS)
@pytest.mark.parametrize("heads", [1, 8, 40, 64, 100, 132, 512])
def test_a_long_sequence_fills_the_gpu(dim, heads):
    for plan in filter(None, choose_plans(1, 1 << 17, heads, dim)):
        assert blocks(plan, heads, dim) > MULTIPROCESSORS / 2
        assert plan.pieces == 1 or blocks(plan, heads, dim) <= MULTIPROCESSORS


@pytest.mark.parametrize("length", [1, 64, 511, 512, 1024, 5000, 70001])
def test_no_piece_is_empty(length):
    for plan in choose_plans(1, length, 2, 128):
        chunks = -(-length // CHUNK)
        chunks_of_piece = -(-chunks // plan.pieces)
        assert (plan.pieces - 1) * chunks_of_piece < chunks


@pytest.mark.parametrize("dim", plans.HEAD_DIMS)
def test_dk_and_dv_have_one_sweep_where_a_thread_block_holds_all_columns(dim):
    for heads in (1, 64, 200):
        reverse = choose_plans(1, 4096, heads, dim).reverse
        assert reverse is None if dim == 256 else dim <= WARPGROUPS * reverse.columns


@pytest.mark.parametrize(
    ("capability", "dims", "dtype", "why"),
    [
        ("9.0", (128, 128), "bfloat16", None),
        ("9.0", (96, 96), "bfloat16", None),
        ("8.0", (128, 128), "bfloat16", "for Hopper GPUs, not A GPU"),
        (None, (128, 128), "bfloat16", "for Hopper GPUs, not A GPU"),
        ("9.0", (80, 80), "bfloat16", "head dims 64, 96, 128, 256, not 80 and 80"),
        ("9.0", (64, 128), "bfloat16", "not 64 and 128"),
        ("9.0", (128, 128), "float32", "takes bfloat16, not float32"),
    ],
)
def test_obstacles_are_said_in_words(capability, dims, dtype, why, monkeypatch):
    device = SimpleNamespace(device_kind="A GPU", compute_capability=capability)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    obstacle = plans.obstacle(*dims, jnp.dtype(dtype))
    assert obstacle is None if why is None else why in obstacle


def test_an_old_jax_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "needs jax 0.11 or newer" in plans.obstacle(128, 128, jnp.bfloat16)
