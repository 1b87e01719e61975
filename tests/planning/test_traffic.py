"""What goes over the network where slices or nodes are several, by hand."""

import dataclasses

import pytest
from planned_runs import planned

from lightning_jax.parallel import MeshConfig
from lightning_jax.planning.estimate import estimate
from lightning_jax.planning.hardware import parse_slice
from lightning_jax.planning.traffic import NETWORK, divides_slices, spread

SIZES = {"data": 2, "fsdp": 8, "expert": 4, "sequence": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "islands", "expected"),
    [
        (("data",), 2, (2, 2)),
        (("fsdp",), 2, (8, 1)),
        (("fsdp", "expert"), 4, (32, 2)),
        (("tensor",), 64, (2, 1)),
        (("data", "fsdp"), 16, (16, 16)),
    ],
)
def test_the_first_axes_lie_across_islands(axes, islands, expected):
    assert spread(axes, SIZES, islands) == expected


@pytest.mark.parametrize(
    ("kind", "sent", "over_network"),
    [("all-gather", 5, 2), ("all-to-all", 5, 4), ("collective-permute", 1, 1)],
)
def test_islands_receive_what_is_gathered_once_and_exchange_all_that_is_not_theirs(kind, sent, over_network):
    # Parts that each of six devices on three islands sends, of the sixth that is its own or of the six for all.
    assert sent * NETWORK[kind](6, 3) == pytest.approx(over_network)


def test_slices_that_hold_a_copy_each_send_gradients_alone_over_the_network():
    config, stage = planned("dense")
    one = estimate(config, stage, parse_slice("v5e:2x4"))
    two = dataclasses.replace(config, mesh=MeshConfig.of(data=2, fsdp=4))
    plan = estimate(two, stage, parse_slice("2xv5e:2x2"))
    assert "network" not in one.seconds
    assert plan.sent["fsdp",].network == 0
    gradients = plan.sent["data",]
    assert gradients.network == gradients.total > 0
    assert plan.seconds["network"] == gradients.total / 3.125e9


def test_slices_that_share_one_copy_gather_it_over_the_network():
    config, stage = planned("dense")
    plan = estimate(config, stage, parse_slice("2xv5e:2x2"))
    weights = plan.sent["fsdp",]
    assert weights.network == pytest.approx(weights.total / 7)


def test_slices_that_do_not_divide_the_axes_are_refused():
    assert divides_slices(SIZES, parse_slice("16xv5e:2x4"))
    assert not divides_slices(SIZES, parse_slice("3xv5e:2x4"))
