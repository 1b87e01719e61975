"""Shuffles: every pass a permutation, every order its own, any element without the others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_jax.input_pipeline.shuffle import fold_key, random_bits, shuffled


@settings(derandomize=True, deadline=None, max_examples=60)
@given(size=st.integers(1, 300), first_epoch=st.integers(0, 2**30), seed=st.integers(0, 2**63))
def test_every_epoch_is_a_permutation(size, first_epoch, seed):
    index = first_epoch * size + np.arange(3 * size)
    epochs = shuffled(index, size, fold_key(seed)).reshape(3, size)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (3, 1)))


def test_elements_do_not_depend_on_which_others_are_asked_for():
    key = fold_key("any")
    together = shuffled(np.arange(1000), 123, key)
    alone = [int(shuffled(np.array([index]), 123, key)[0]) for index in range(1000)]
    assert together.tolist() == alone


def test_epochs_and_keys_give_different_orders():
    orders = shuffled(np.arange(400), 100, fold_key(0)).reshape(4, 100)
    other = shuffled(np.arange(100), 100, fold_key(1))
    for first, second in [(orders[0], orders[1]), (orders[1], orders[2]), (orders[0], other)]:
        assert np.count_nonzero(first == second) < 10


@pytest.mark.parametrize("size", [2, 3, 5, 17, 64])
def test_every_element_stands_equally_often_at_every_place(size):
    epochs = 20_000 // size
    orders = shuffled(np.arange(epochs * size), size, fold_key("uniform")).reshape(epochs, size)
    counts = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    # 5.5 standard deviations of a binomial count.
    assert np.abs(counts - epochs / size).max() < 5.5 * np.sqrt(epochs / size) + 1


def test_neighbours_are_scattered_in_a_store_of_ten_billion_rows():
    order = shuffled(5 * 10**10 + np.arange(10_000), 10**10, fold_key("large"))
    assert len(np.unique(order)) == 10_000
    assert abs(order.mean() / 10**10 - 0.5) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_random_bits_are_splitmix64():
    # The reference generator's first outputs for the seed 0 (Java's SplittableRandom).
    step = 0x9E3779B97F4A7C15
    counters = np.array([0, step, 2 * step % 2**64], np.uint64)
    assert [hex(bits) for bits in random_bits(counters)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_orders_are_the_same_on_every_machine_and_in_every_version():
    # What a resumed run has to find again.
    order = shuffled(np.arange(10**9, 10**9 + 6), 10**6 + 3, fold_key("rows", 17, "text"))
    assert order.tolist() == [601_140, 758_041, 201_313, 289_815, 443_391, 491_988]


def test_keys_depend_on_parts_and_their_order():
    assert len({fold_key(*parts) for parts in [(), (0,), ("0",), (0, 1), (1, 0), ("a", 1), ("a1",)]}) == 7
