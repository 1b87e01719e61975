"""The fork task of benchmarks/policy_gradients.py in two minutes: CISPO learns it, and clipping meets the fork."""

import forgotten_carries
import numpy as np
import policy_gradients
import pytest

SEEDS = (0, 1)


def test_the_fork_is_where_the_right_sum_leaves_the_forgetful_one():
    assert forgotten_carries.without_carry(47, 38) == "75"
    assert forgotten_carries.without_carry(95, 17) == "02"
    assert [forgotten_carries.fork(*pair) for pair in ((47, 38), (95, 17), (20, 91))] == [0, 0, 2]
