"""Scores of packed spans are those of each span alone, on one device and on a mesh; windows score each token once."""

import dataclasses
import functools

import numpy as np
import pytest
from tiny_evaluation import CONFIG, TOKENIZER, greedy_alone, log_probs_alone, scorer, trained_model

from lightning_jax.evaluation import Scorer, Span, windows
from lightning_jax.evaluation.scoring import PackedSpans, encode_pair
from lightning_jax.input_pipeline import encode


def spans(seed=0):
    """Of many lengths, shuffled; some score one token only."""
    dice = np.random.default_rng(seed)
    ids = [dice.integers(0, 258, size).astype(np.int32) for size in (2, 3, 5, 17, 33, 64, 65, 100, 2, 50, 7)]
    return [Span(each, int(dice.integers(1, len(each)))) for each in ids]


def check(scored, given):
    for scores, span in zip(scored, given, strict=True):
        log_probs, likeliest = log_probs_alone(span.ids, span.first)
        np.testing.assert_allclose(scores.log_probs, log_probs, atol=1e-5)
        np.testing.assert_array_equal(scores.likeliest, likeliest)
        assert scores.log_likelihood == pytest.approx(log_probs.sum(dtype=np.float64), abs=1e-4)


def test_packed_spans_score_as_each_alone():
    given = spans()
    assert len(PackedSpans([span.ids for span in given], 256)) < len(given)
    check(scorer().score(given), given)


def test_spans_longer_than_the_context_and_small_batches_change_nothing():
    given = spans(1)
    check(scorer(batch_tokens=1).score(given), given)


@pytest.mark.parametrize("layout", [(1, 2, 2, 2), pytest.param((2, 4, 1, 1), marks=pytest.mark.slow)])
def test_scores_on_a_mesh_are_those_of_one_device(layout):
    given = spans(2)
    check(scorer(layout).score(given), given)


@pytest.mark.parametrize("layout", [(1, 1, 1, 1), (2, 1, 1, 2)])
def test_continuations_score_from_one_state_of_their_prompt_as_each_alone(layout):
    dice = np.random.default_rng(4)
    prompts = [dice.integers(0, 258, size).astype(np.int32) for size in (20, 1, 33)]
    continuations = [[dice.integers(0, 258, size).astype(np.int32) for size in (3, 17)] for _ in prompts]
    scores = scorer(layout).score_continuations(prompts, continuations)
    for prompt, own, found in zip(prompts, continuations, scores, strict=True):
        alone = [log_probs_alone([*prompt, *each], len(prompt))[0].sum(dtype=np.float64) for each in own]
        np.testing.assert_allclose(found, alone, atol=1e-4)


def test_greedy_is_told_of_the_greedy_continuation_only():
    prompt = [256, 104, 105]
    ids = np.array([*prompt, *greedy_alone(prompt, 4)])
    other = np.array([*ids[:-1], (ids[-1] + 1) % 258])
    right, wrong, first = scorer().score([Span(ids, 3), Span(other, 3), Span(other[:-1], 3)])
    assert right.greedy
    assert not wrong.greedy
    assert wrong.likeliest.tolist() == [True, True, True, False]
    assert first.greedy


def test_no_expert_drops_tokens_in_evaluation():
    config = dataclasses.replace(CONFIG, expert_dispatch="capacity", capacity_factor=0.1)
    given = spans(3)[:4]
    check(Scorer(trained_model(config=config)).score(given), given)


def test_few_row_lengths_serve_all_spans():
    lengths = {scorer(context_length=3000)._row_length(inputs) for inputs in range(1, 3001)}
    assert lengths == {256, 1024, 3000}
    assert scorer(context_length=64)._row_length(10) == 64
    # Beyond the model's own context too: each length is compiled.
    assert {scorer(context_length=64)._row_length(inputs) for inputs in range(65, 2000)} == {256, 1024, 4096}


@pytest.mark.parametrize("stride", [1, 3, 10])
@pytest.mark.parametrize("size", [2, 10, 11, 12, 21, 30, 47])
def test_windows_score_each_token_once_in_order(size, stride):
    ids = np.arange(size)
    cut = list(windows(ids, 10, stride))
    assert np.concatenate([span.ids[span.first :] for span in cut]).tolist() == list(range(1, size))
    for span in cut:
        assert len(span.ids) - 1 == min(10, size - 1)
        assert span.first >= 1
        assert len(span.ids) - span.first <= (10 if span is cut[0] else stride)
    assert not list(windows(ids[:1], 10, stride))


@pytest.mark.parametrize(
    ("context", "continuation", "border"),
    [("ab", " cd", 2), ("ab ", "cd", 2), ("ab \n", "cd", 2), ("", "cd", 0), ("  ", "cd", 0)],
)
def test_spaces_between_context_and_continuation_go_to_the_continuation(context, continuation, border):
    before, scored = encode_pair(functools.partial(encode, TOKENIZER), context, continuation)
    whole = list((context + continuation).encode())
    assert [before.tolist(), scored.tolist()] == [whole[:border], whole[border:]]
