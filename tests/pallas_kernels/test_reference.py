"""The sequential reference against loops in numpy."""

import jax
import jax.numpy as jnp
import pytest
from lightning_cases import assert_close, by_jax, by_loops, random_case


@pytest.mark.parametrize("borders", [None, 6])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_reference_equals_loops_in_fp64(length, borders):
    case = random_case(length, borders=borders)
    with jax.enable_x64(True):
        assert_close(by_jax(case, jnp.float64, implementation="reference"), by_loops(case), 1e-14)


def test_reference_equals_loops_in_fp32():
    case = random_case(200, borders=4)
    assert_close(by_jax(case, jnp.float32, implementation="reference"), by_loops(case), 1e-6)
