"""The constraints of Tulu 3's training data of instructions (RLVR-IFeval), which are IFEval's in another wording.

Source: Tulu 3 (arXiv 2411.15124), section 6.1; a record's `ground_truth` is {"func_name": ..., arguments} as JSON, one
constraint for each prompt.  Numbers are exact here where IFEval has a bound, `quantifier` is "at least", "at most" or
"around" (a tenth, for sentences one), and paragraphs are divided by `* * *`.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_jax.errors import UserError
from lightning_jax.rewards.answers import final_part
from lightning_jax.rewards.ifeval import (
    follows,
    is_json,
    language_of,
    placeholders,
    require_langdetect,
    sentences,
    titles,
)
from lightning_jax.rewards.reward import Completion, Reward, required


def _quantified(count: int, number: int, quantifier: str, tolerance: int) -> bool:
    match quantifier:
        case "at least":
            return count >= number
        case "at most":
            return count <= number
        case "around":
            return abs(count - number) <= tolerance
    raise UserError(f"quantifier={quantifier!r} is none of at least, at most, around")


def _tenth(number: int) -> int:
    return max(round(number / 10), 1)


def _choice(text: str, options: Sequence[str] | str) -> bool:
    listed = re.split(r"/|, ", options) if isinstance(options, str) else options
    return any(each in text for each in listed)


def _two_responses(text: str) -> bool:
    parts = [each.strip() for each in text.split("******")]
    return len(parts) == 2 and parts[0] != parts[1]


def _paragraphs(text: str, N: int) -> bool:
    parts = re.split(r"\* \* \*", text)
    return len(parts) == N and all(each.strip() for each in parts)


def _first_word(text: str, N: int, first_word: str, i: int) -> bool:
    paragraphs = text.split("\n\n")
    return len(paragraphs) == N and i <= N and paragraphs[i - 1].strip().startswith(first_word)


def _sections(text: str, N: int, section_splitter: str) -> bool:
    parts = text.split(section_splitter)
    return len(parts if parts[0] else parts[1:]) == N


FUNCTIONS: dict[str, Callable[..., bool]] = {
    "verify_keywords": lambda text, keyword_list: all(each.lower() in text.lower() for each in keyword_list),
    "verify_keyword_frequency": lambda text, word, N: re.findall(r"\w+", text.lower()).count(word.lower()) == N,
    "validate_forbidden_words": lambda text, forbidden_words: (
        not any(each.lower() in text.lower() for each in forbidden_words)
    ),
    "verify_letter_frequency": lambda text, letter, N: text.count(letter) == N,
    "validate_response_language": lambda text, language: language_of(text) == language,
    "verify_paragraph_count": _paragraphs,
    "validate_word_constraint": lambda text, N, quantifier: _quantified(len(text.split()), N, quantifier, _tenth(N)),
    "verify_sentence_constraint": lambda text, N, quantifier: _quantified(sentences(text), N, quantifier, 1),
    "validate_paragraphs": _first_word,
    "verify_postscript": lambda text, postscript_marker: bool(text.partition(postscript_marker)[2].strip()),
    "validate_placeholders": lambda text, N: placeholders(text) >= N,
    "verify_bullet_points": lambda text, N: len(re.findall(r"^[ \t]*[*-]", text, re.MULTILINE)) == N,
    "validate_title": lambda text: bool(titles(text)),
    "validate_choice": _choice,
    "validate_highlighted_sections": lambda text, N: len(re.findall(r"\*.*?\*", text)) >= N,
    "validate_sections": _sections,
    "validate_json_format": is_json,
    "validate_repeat_prompt": lambda text, original_prompt: text.startswith(original_prompt),
    "validate_two_responses": _two_responses,
    "validate_uppercase": str.isupper,
    "validate_lowercase": str.islower,
    "validate_frequency_capital_words": lambda text, N, quantifier: _quantified(
        len(re.findall(r"\b[A-Z]+\b", text)), N, quantifier, _tenth(N)
    ),
    "validate_end": lambda text, end_phrase: text.endswith(end_phrase),
    "validate_quotation": lambda text: len(text) > 1 and text[0] == text[-1] == '"',
    "validate_no_commas": lambda text: "," not in text,
}


@dataclass(frozen=True)
class Tulu3IFEvalReward:
    """One where the constraint in the record's `ground_truth` is met.

    Raises:
        UserError: langdetect is not installed, which tells languages.
    """

    def __post_init__(self) -> None:
        require_langdetect()

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        return [self._reward(completion) for completion in completions]

    def _reward(self, completion: Completion) -> Reward:
        truth = required(completion, "ground_truth")
        constraint = dict(json.loads(truth) if isinstance(truth, str) else truth)
        name = constraint.pop("func_name", None)
        met = follows(final_part(completion.text), name, constraint, FUNCTIONS)
        return Reward(float(met), f"{'meets' if met else 'misses'} {name}")
