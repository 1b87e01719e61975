"""Mixtures: exact shares after any number of rows, random access, one line for each mistake."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_jax.input_pipeline.config import MixtureConfig
from lightning_jax.input_pipeline.mixture import Mixture, MixtureError


def mixture(start, end=None, num_rows=1000, seed=0):
    start = {chr(ord("a") + index): weight for index, weight in enumerate(start)}
    end = start if end is None else dict(zip(start, end, strict=True))
    return Mixture(MixtureConfig(start, end, "split"), start.keys(), num_rows, seed)


@st.composite
def mixtures(draw):
    corpora = draw(st.integers(1, 7))
    weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 1)), min_size=corpora, max_size=corpora).filter(any)
    start, end = draw(weights), draw(weights)
    return mixture(start, end, draw(st.integers(1, 400)), draw(st.integers(0, 99))), start, end


@settings(derandomize=True, deadline=None, max_examples=150)
@given(mixtures())
def test_counts_differ_from_shares_by_less_than_the_stated_bound_after_any_number_of_rows(made):
    mixed, start, end = made
    num_rows = 450
    corpus, _ = mixed.rows(0, num_rows)
    counts = np.cumsum(corpus[:, None] == np.arange(len(mixed.names)), axis=0)
    shares = np.array([mixed.shares(rows) for rows in range(1, num_rows + 1)])
    largest = {
        name: max(first / sum(start), last / sum(end)) for name, first, last in zip("abcdefg", start, end, strict=False)
    }
    for index, name in enumerate(mixed.names):
        others = len(mixed.names) - 1
        bound = 1 + largest[name] * (others - 1) if others else 0
        assert np.abs(counts[:, index] - shares[:, index]).max() <= bound + 1e-6


@settings(derandomize=True, deadline=None, max_examples=100)
@given(mixtures(), st.integers(0, 300), st.integers(1, 100))
def test_any_range_of_rows_is_that_part_of_the_whole(made, first, count):
    mixed, _, _ = made
    corpus, row = mixed.rows(0, 450)
    part = mixed.rows(first, count)
    np.testing.assert_array_equal(part[0], corpus[first : first + count])
    np.testing.assert_array_equal(part[1], row[first : first + count])
    np.testing.assert_array_equal(mixed.counts(first), np.bincount(corpus[:first], minlength=len(mixed.names)))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(mixtures())
def test_every_row_of_every_corpus_stands_once_and_in_order(made):
    mixed, _, _ = made
    corpus, row = mixed.rows(0, 450)
    for index in range(len(mixed.names)):
        np.testing.assert_array_equal(row[corpus == index], np.arange(np.count_nonzero(corpus == index)))


def test_shares_are_the_integral_of_linearly_moving_weights():
    mixed = mixture([7, 3, 0], [1, 1, 2], num_rows=500)
    for rows in (0, 1, 250, 500):
        moments = (np.arange(100_000) + 0.5) / 100_000 * rows
        for index, (start, end) in enumerate([(0.7, 0.25), (0.3, 0.25), (0, 0.5)]):
            expected = np.mean(start + (end - start) * moments / 500) * rows
            assert mixed.shares(rows)[index] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert mixed.shares(700)[2] == pytest.approx(mixed.shares(500)[2] + 200 * 0.5)


def test_seven_to_three_is_exact_to_one_row_anywhere_in_five_billion_rows():
    mixed = mixture([0.7, 0.3], num_rows=5 * 10**9)
    for rows in (10**9, 5 * 10**9 - 1, 5 * 10**9):
        counts = mixed.counts(rows)
        assert counts.sum() == rows
        assert abs(counts[0] - 0.7 * rows) < 1.001
    corpus, row = mixed.rows(5 * 10**9 - 1000, 1000)
    assert abs(np.count_nonzero(corpus == 0) - 700) <= 2
    assert row[corpus == 0][-1] == mixed.counts(5 * 10**9)[0] - 1


def test_moving_weights_hold_in_five_billion_rows():
    num_rows = 5 * 10**9
    mixed = mixture([1, 0, 1e-9], [0, 1, 1e-9], num_rows=num_rows)
    for rows in (1, 1000, num_rows // 3, num_rows - 10**6, num_rows):
        counts = mixed.counts(rows)
        assert counts.sum() == rows
        np.testing.assert_allclose(counts, mixed.shares(rows), atol=2.01)
    assert mixed.counts(num_rows)[0] == pytest.approx(num_rows / 2, abs=3)


def test_order_has_no_period():
    corpus, _ = mixture([0.5, 0.5], num_rows=10**5).rows(0, 10**5)
    signal = np.where(corpus == 0, 1.0, -1.0)
    # Keeping the shares makes a row's successor more likely of the other corpus; beyond that nothing is to be seen.
    for distance in (2, 3, 4, 8, 10, 16, 64, 100, 256):
        assert abs(np.mean(signal[distance:] * signal[:-distance])) < 0.02
    power = np.abs(np.fft.rfft(signal)) ** 2 / len(signal)
    assert power.max() < 30  # a period would stand out as a line of height ~ number of rows


def test_order_is_the_same_on_every_machine_and_in_every_version():
    # What a resumed run has to find again; the shares after 10⁹ of 5·10⁹ rows are 0.295, 0.025 and 0.68 of them.
    config = MixtureConfig({"text": 7, "code": 3, "math": 0}, {"text": 2, "code": 1, "math": 1}, "split")
    corpus, row = Mixture(config, ["text", "code", "math"], 5 * 10**9, seed=17).rows(10**9, 8)
    assert corpus.tolist() == [2, 0, 2, 2, 2, 2, 0, 1]
    assert row[corpus == 2].tolist() == list(range(680_000_000, 680_000_005))
    assert row[corpus == 0].tolist() == [295_000_000, 295_000_001]
    assert row[corpus == 1].tolist() == [25_000_000]


def test_seed_decides_the_order():
    first, again, other = (mixture([1, 1], seed=seed).rows(0, 200)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert 50 < np.count_nonzero(first != other) < 150


def test_order_does_not_depend_on_the_order_of_names():
    shares = {f"corpus_{index}": 0.1 * index for index in range(1, 12)}
    forward, backward = (dict(items) for items in (shares.items(), reversed(shares.items())))
    rows = [Mixture(MixtureConfig(w, w, "split"), list(w), 10**6, 0).rows(0, 1000) for w in (forward, backward)]
    np.testing.assert_array_equal(*rows)
    shares = [Mixture(MixtureConfig(w, w, "split"), list(w), 10**6, 0).shares(10**6) for w in (forward, backward)]
    np.testing.assert_array_equal(*shares)


def test_corpora_without_a_share_are_left_out():
    assert mixture([1, 0, 2], [1, 0, 0]).names == ("a", "c")


@pytest.mark.parametrize(
    ("start", "end", "line"),
    [
        ({"txt": 1.0}, {"txt": 1.0}, "mixture: there is no corpus 'txt'; did you mean 'text'?"),
        ({"text": -1.0}, {"text": 1.0}, "mixture: start.text: -1.0 is no share; 0 leaves a corpus out"),
        ({"text": 1.0}, {"text": math.nan}, "mixture: end.text: nan is no share; 0 leaves a corpus out"),
        ({"text": 1.0}, {"text": math.inf}, "mixture: end.text: inf is no share; 0 leaves a corpus out"),
        ({"text": 0.0}, {"text": 1.0}, "mixture: start: no corpus has a share; make one positive"),
        (
            {"text": 1.0, "code": 1.0},
            {"text": 1.0},
            "mixture: end: does not name the same corpora as start (code); a share may be 0",
        ),
    ],
)
def test_mistakes_are_one_line(start, end, line):
    with pytest.raises(MixtureError) as caught:
        Mixture(MixtureConfig(start, end, "split"), ["text", "code"], 10, 0)
    assert str(caught.value) == line


def test_all_mistakes_are_told_at_once():
    with pytest.raises(MixtureError) as caught:
        Mixture(MixtureConfig({"txt": -1, "cod": 0}, {"txt": 0, "cod": 0}, "split"), ["text", "code"], 10, 0)
    assert len(str(caught.value).splitlines()) == 4
