"""IFEval's constraints: as lm-evaluation-harness judges them, and audited."""

import importlib.util
import json
from pathlib import Path

import pytest
from audit import assert_audited, completion

from lightning_jax.errors import UserError
from lightning_jax.rewards.ifeval import CONSTRAINTS, IFEvalReward, capital_words, follows, sentences

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "ifeval.json").read_text(encoding="utf-8"))
NEED_LANGUAGE = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}
needs_langdetect = pytest.mark.skipif(
    importlib.util.find_spec("langdetect") is None, reason="needs langdetect: pip install 'lightning_jax[rewards]'"
)


@pytest.mark.parametrize(
    "constraint",
    [pytest.param(each, marks=needs_langdetect) if each in NEED_LANGUAGE else each for each in CONSTRAINTS],
)
def test_verdicts_are_those_of_lm_evaluation_harness(constraint):
    cases = [each[1:] for each in GOLDEN if each[0] == constraint]
    assert {expected for expected, *_ in cases} == {True, False}
    assert [case for case in cases if follows(case[2], constraint, case[1]) != case[0]] == []


@needs_langdetect
def test_the_reward_is_audited():
    record = {
        "instruction_id_list": ["punctuation:no_comma", "startend:end_checker", "change_case:english_lowercase"],
        "kwargs": [{}, {"end_phrase": "the end"}, {"end_phrase": None}],
    }
    assert_audited(
        IFEvalReward(),
        record,
        gold=["once upon a time there was a cat. the end", "<think>A, B</think>it rains in the town today. the end"],
        wrong=["once upon a time, there was a cat. the end", "Once upon a time there was a cat. the end", "the cat"],
    )


@needs_langdetect
def test_reasons_name_what_is_missed():
    record = {"instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}]}
    rewards = IFEvalReward()([completion(text, **record) for text in ("a, b", "<<a>>")])
    assert [each.reason for each in rewards] == ["misses punctuation:no_comma, detectable_format:title", "meets all 2"]


@needs_langdetect
def test_a_text_without_a_language_is_in_none():
    assert not follows("12345", "language:response_language", {"language": "de"})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("Mr. Smith came at 5 p.m. today.", 1),
        ('"Go," he said. "Now!" She left', 3),
        ("no mark", 1),
        ("", 0),
    ],
)
def test_sentences_are_counted(text, count):
    assert sentences(text) == count


def test_words_in_capitals_are_counted_as_a_tokenizer_does():
    assert capital_words("NASA (BBC) and I DON'T see Mr. X2, U.S. x-RAY A-B") == 8


def test_an_unknown_constraint_or_argument_is_said_in_one_line():
    with pytest.raises(UserError, match="there is no constraint 'keywords:rhymes'"):
        follows("a", "keywords:rhymes", {})
    with pytest.raises(UserError, match=r"constraint punctuation:no_comma with arguments \{'commas': 1\}"):
        follows("a", "punctuation:no_comma", {"commas": 1})


def test_without_langdetect_it_says_so_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lightning_jax\[rewards\]'"):
        IFEvalReward()
