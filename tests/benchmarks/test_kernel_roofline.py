"""The floors of attention against numbers computed by hand."""

import pytest
from kernel_roofline import Case, Rates, floor, lightning, of_gpu_kernel, softmax, work

H200 = Rates(operations=790e12, bytes=4.3e12)
LAYER = Case(batch=1, heads=64, dim=128, length=8192)  # 524,288 tokens of heads


def test_lightning_attention_by_hand():
    """Per token of a head at K = 128, C = 64: 98,304 and 212,992 operations, 512 and 960 numbers."""
    assert lightning(LAYER, "forward", 2) == (524_288 * 98_304, 524_288 * 1024)
    assert lightning(LAYER, "backward", 2) == (524_288 * 212_992, 524_288 * 1920)
    assert lightning(LAYER, "training", 2) == (524_288 * 311_296, 524_288 * 2944)
    assert lightning(LAYER, "forward", 4).bytes == 524_288 * 2048


def test_softmax_attention_by_hand():
    """8,192 tokens attend to 4,096 others on average: two matmuls forward, five backward."""
    assert softmax(LAYER, "forward", 2) == (64 * 8192 * 4096 * 128 * 2 * 2, 524_288 * 1024)
    assert softmax(LAYER, "backward", 2).operations == 64 * 8192 * 4096 * 128 * 2 * 5


@pytest.mark.parametrize(("length", "forward", "backward"), [(8192, 0.1249, 0.2341), (131_072, 1.998, 3.746)])
def test_the_floor_is_the_memory_where_heads_are_128_wide(length, forward, backward):
    """In milliseconds: 512 MiB and 960 MiB at 8K tokens."""
    case = LAYER._replace(length=length)
    assert 1e3 * floor(case, "forward", 2, H200) == pytest.approx(forward, rel=1e-3)
    assert 1e3 * floor(case, "backward", 2, H200) == pytest.approx(backward, rel=1e-3)
    assert 1e3 * floor(case, "training", 2, H200) == pytest.approx(forward + backward, rel=1e-3)


def test_the_floor_is_the_arithmetic_where_it_takes_longer():
    slow = Rates(operations=79e12, bytes=4.3e12)
    assert floor(LAYER, "forward", 2, slow) == pytest.approx(524_288 * 98_304 / 79e12)


@pytest.mark.parametrize(
    ("name", "operations", "numbers"),
    [("sweep", 98_304, 512), ("reverse_sweep", 98_304, 512), ("dk_dv", 163_840, 768), ("reverse_states", 32_768, 256)],
)
def test_gpu_kernels_by_hand(name, operations, numbers):
    """A sweep is a forward. dK and dV: Aᵀ, dAᵀ and a product with each, two with dS, and what is added to dS."""
    needed = of_gpu_kernel(f"lightning_attention_{name}", LAYER)
    assert needed == (524_288 * operations, 524_288 * 2 * numbers)


def test_each_implementation_is_counted_as_what_it_computes():
    assert work("torch flash", LAYER, "forward", 2) == softmax(LAYER, "forward", 2)
    assert work("fla chunk", LAYER, "backward", 2) == lightning(LAYER, "backward", 2)
