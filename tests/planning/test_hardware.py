"""Slices by their names."""

from types import SimpleNamespace

import pytest

from lightning_jax.errors import UserError
from lightning_jax.planning.hardware import CHIPS, PRICES, parse_slice, slice_of


@pytest.mark.parametrize(
    ("text", "chips", "devices", "slices", "islands"),
    [
        ("v5p:8x8x8", 512, 512, 1, 1),
        ("tpu7x:4x8x8", 256, 512, 1, 1),
        ("4xtpu7x:2x2x2", 32, 64, 4, 4),
        ("2xv6e:16x16", 512, 512, 2, 2),
        ("h100:4x8", 32, 32, 1, 4),
        ("h100:4", 4, 4, 1, 1),
        ("cpu:8", 8, 8, 1, 1),
    ],
)
def test_shapes_are_in_chips_and_several_slices_are_counted(text, chips, devices, slices, islands):
    target = parse_slice(text)
    assert (target.num_chips, target.num_devices, target.num_slices) == (chips, devices, slices)
    assert (target.num_islands, target.name) == (islands, text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("v5q:8", "no chip 'v5q'; did you mean 'v5p'"),
        ("V5P:8x8x8", "no chip 'V5P'; did you mean 'v5p'"),
        ("v5p", "not of the form v5p:8x8x8 or v5p:512, or 4xv5p:8x8x8 for four slices"),
        ("v5p:8*8*8", "not of the form"),
        ("0xv5p:8", "not of the form"),
        ("v6e:32x32", "a slice of v6e has at most 256 chips; several are written 4xv6e:SHAPE"),
        ("v5p-1024", "here a slice is named by its chips: v5p:512"),
        ("2xv5litepod-256", "here a slice is named by its chips: 2xv5e:256"),
        ("2xh100:8", "only TPUs come in slices; 2 x 8 h100 are h100:2x8"),
    ],
)
def test_what_names_no_slice_is_told_in_one_line(text, error):
    with pytest.raises(UserError) as raised:
        parse_slice(text)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_devices_that_are_here_are_slices_by_their_index():
    devices = [SimpleNamespace(device_kind="TPU v5p", slice_index=place // 4) for place in range(8)]
    target = slice_of(devices)
    assert (target.name, target.num_slices, target.num_chips) == ("2xv5p:4", 2, 8)


def test_prices_are_of_chips_and_say_whose_and_of_when():
    assert set(PRICES) <= set(CHIPS)
    assert all("20" in price.source for price in PRICES.values())
