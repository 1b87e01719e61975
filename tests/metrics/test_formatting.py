"""Numbers read as people write them, also where rounding reaches the next unit."""

import math

import pytest

from lightning_jax.metrics.formatting import count, duration, scientific, size


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1.5, "1.50"),
        (1000, "1.00k"),
        (1_234_567, "1.23M"),
        (9_996, "10.0k"),
        (99_960, "100k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (456_089_655_296, "456B"),
        (1.5e13, "15.0T"),
        (-1_500, "-1.50k"),
        (math.nan, "nan"),
    ],
)
def test_count_keeps_three_digits(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(512, "512 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1.9 * 2**30, "1.90 GiB"), (80 * 2**30, "80.0 GiB")],
)
def test_size_is_binary(number, text):
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (45, "45s"),
        (59.6, "1m00s"),
        (250, "4m10s"),
        (3599.7, "1h00m"),
        (90_000, "1d01h"),
        (math.inf, "n/a"),
    ],
)
def test_duration_shows_the_two_largest_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(0.0, "0"), (3e-4, "3.00e-4"), (1.0, "1.00e0"), (2.5e-15, "2.50e-15")])
def test_scientific(rate, text):
    assert scientific(rate) == text
