"""Batch sizes against a walk over every step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_jax.optimizers import BatchSizeConfig, BatchSizes


def walk(config: BatchSizeConfig, context_length: int, tokens: int) -> list[tuple[int, int]]:
    """(rows, tokens consumed before) of every step, one after another."""
    steps, consumed = [], 0
    while consumed < tokens:
        begun = [batch for batch, start in zip(config.tokens, config.starts, strict=True) if start <= consumed]
        steps.append((begun[-1] // context_length, consumed))
        consumed += begun[-1]
    return steps


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    gaps=st.lists(st.integers(1, 90), min_size=3, max_size=3),
    context_length=st.integers(1, 5),
    tokens=st.integers(1, 400),
)
def test_random_access_equals_walking_over_every_step(rows, gaps, context_length, tokens):
    starts = [0]
    for gap in gaps[: len(rows) - 1]:
        starts.append(starts[-1] + gap)
    config = BatchSizeConfig(tuple(each * context_length for each in rows), tuple(starts), 0)
    sizes = BatchSizes(config, context_length, tokens)
    expected = walk(config, context_length, tokens)
    assert [(sizes.rows(step), sizes.tokens_before(step)) for step in range(sizes.num_steps)] == expected
    assert sizes.num_steps == len(expected)
    assert sizes.first_row(sizes.num_steps) == sizes.num_rows == sum(rows for rows, _ in expected)


def test_text_01_ramps_at_its_token_counts():
    million = 2**20
    config = BatchSizeConfig(
        tuple(size * million for size in (16, 32, 64, 128)), (0, 69 * 10**9, 790 * 10**9, 4_700 * 10**9), 0
    )
    sizes = BatchSizes(config, 8192, 7_200 * 10**9)
    for rows, start in ((4096, 69 * 10**9), (8192, 790 * 10**9), (16384, 4_700 * 10**9)):
        step = next(s for s in _bisected(sizes, start))
        assert sizes.rows(step) == rows
        assert sizes.rows(step - 1) == rows // 2
        assert sizes.tokens_before(step - 1) < start <= sizes.tokens_before(step)


def _bisected(sizes: BatchSizes, tokens: int):
    low, high = 0, sizes.num_steps
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if sizes.tokens_before(middle) < tokens else (low, middle)
    yield low


def test_tinyllama_takes_its_published_number_of_steps():
    sizes = BatchSizes(BatchSizeConfig((1024 * 2048,), (0,), 0), 2048, 3 * 10**12)
    assert sizes.num_steps == 1_430_512
    assert sizes.tokens_before(sizes.num_steps) == 1_430_512 * 2_097_152


def test_a_batch_of_ragged_rows_is_refused():
    with pytest.raises(ValueError, match="100 is no multiple of context_length=64"):
        BatchSizes(BatchSizeConfig((100,), (0,), 0), 64, 1000)


def test_a_step_outside_the_stage_is_refused():
    sizes = BatchSizes(BatchSizeConfig((64,), (0,), 0), 64, 640)
    with pytest.raises(IndexError, match="step 11"):
        sizes.rows(11)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (BatchSizeConfig((), (), 0), "tokens"),
        (BatchSizeConfig((64, 128), (0,), 0), "starts"),
        (BatchSizeConfig((64, 128), (0, 0), 0), "starts"),
        (BatchSizeConfig((64,), (5,), 0), "starts"),
        (BatchSizeConfig((64,), (0,), -1), "micro_batch_tokens"),
    ],
)
def test_problems_name_the_field(config, field):
    assert field in [problem.split(":")[0] for problem in config.problems()]
    assert BatchSizeConfig((64, 128), (0, 1000), 0).problems() == []
