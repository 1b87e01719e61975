"""The constraints of Tulu 3's training data, each by what meets it and what narrowly does not."""

import importlib.util
import json

import pytest
from audit import GARBAGE, completion

from lightning_jax.errors import UserError
from lightning_jax.rewards import Tulu3IFEvalReward
from lightning_jax.rewards.tulu3_ifeval import FUNCTIONS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("langdetect") is None, reason="needs langdetect: pip install 'lightning_jax[rewards]'"
)
CASES = {
    "verify_keywords": ({"keyword_list": ["Cat", "dog"]}, "cats and DOGS", "cats"),
    "verify_keyword_frequency": ({"word": "cat", "N": 2}, "Cat, cat. cats", "cat cat cat"),
    "validate_forbidden_words": ({"forbidden_words": ["cat"]}, "a dog", "Cats"),
    "verify_letter_frequency": ({"letter": "a", "N": 2}, "banAna b", "banana"),
    "validate_response_language": (
        {"language": "de"},
        "Der Zug fährt heute leider erst am späten Abend.",
        "The train leaves late in the evening today.",
    ),
    "verify_paragraph_count": ({"N": 2}, "a\n* * *\nb", "a\n* * *\n"),
    "validate_word_constraint": ({"N": 20, "quantifier": "around"}, "a " * 22, "a " * 23),
    "verify_sentence_constraint": ({"N": 2, "quantifier": "at most"}, "One. Two.", "One. Two. Three."),
    "validate_paragraphs": ({"N": 2, "first_word": "So", "i": 2}, "a\n\nSo b", "So a\n\nb"),
    "verify_postscript": ({"postscript_marker": "P.S."}, "a\nP.S. b", "a\nP.S."),
    "validate_placeholders": ({"N": 2}, "[a] [b]", "[a]"),
    "verify_bullet_points": ({"N": 2}, "* a\n- b", "* a\n* b\n* c"),
    "validate_title": ({}, "<<a>>", "<a>"),
    "validate_choice": ({"options": ["yes", "no"]}, "yes!", "maybe"),
    "validate_highlighted_sections": ({"N": 2}, "*a* *b*", "*a*"),
    "validate_sections": ({"N": 2, "section_splitter": "Section"}, "Section 1 Section 2", "Section 1"),
    "validate_json_format": ({}, '{"a": 1}', "{a: 1}"),
    "validate_repeat_prompt": ({"original_prompt": "Do it"}, "Do it. Done", "I do it"),
    "validate_two_responses": ({}, "a******b", "a******a"),
    "validate_uppercase": ({}, "ALL OF IT", "All OF IT"),
    "validate_lowercase": ({}, "all of it", "all of It"),
    "validate_frequency_capital_words": ({"N": 2, "quantifier": "at least"}, "AB and CD", "AB and Cd"),
    "validate_end": ({"end_phrase": "the end."}, "so, the end.", "the end. Really"),
    "validate_quotation": ({}, '"a"', '"a'),
    "validate_no_commas": ({}, "a b", "a, b"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_constraint_tells_what_meets_it(name):
    arguments, right, wrong = CASES[name]
    # In the data every argument is there, null where the constraint has none of it.
    record = {"ground_truth": json.dumps({"unused": None, "func_name": name, **arguments})}
    rewards = Tulu3IFEvalReward()([completion(text, **record) for text in (right, wrong, "", "<think>a</think>")])
    assert [each.score for each in rewards] == [1, 0, 0, 0]
    assert rewards[0].reason == f"meets {name}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_text_makes_a_constraint_raise(name):
    record = {"ground_truth": {"func_name": name, **CASES[name][0]}}
    assert len(Tulu3IFEvalReward()([completion(text, **record) for text in GARBAGE])) == len(GARBAGE)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"func_name": "rhymes"}, "there is no constraint 'rhymes'"),
        ({"func_name": "validate_title", "N": 1}, "validate_title with arguments {'N': 1}"),
        ({"func_name": "validate_word_constraint", "N": 1, "quantifier": "some"}, "quantifier='some' is none of"),
    ],
)
def test_what_there_is_not_is_said_in_one_line(truth, message):
    with pytest.raises(UserError) as raised:
        Tulu3IFEvalReward()([completion("a", ground_truth=truth)])
    assert message in str(raised.value)
