"""The 25 constraints of IFEval, each checked by a few lines.

Source: Zhou et al., "Instruction-Following Evaluation for Large Language Models" (arXiv 2311.07911), table 1; the
meaning of each is that of lm-evaluation-harness, strict.  What differs: a text without any language (figures alone) is
in none, where theirs is in every one; sentences and words in capitals are told apart by rules and not by a trained
tokenizer.
"""

import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_jax.errors import UserError
from lightning_jax.rewards.answers import final_part
from lightning_jax.rewards.reward import Completion, Reward, required

# Those that the usual tokenizer of English sentences knows; e.g. and i.e. are not among them.
ABBREVIATIONS = frozenset(
    """a.d a.m adm aug ave bros calif co col conn corp ct d.c dec dr feb fla ft ga gen inc jan jr lt ltd maj messrs mich
    minn mr mrs ms n.y nov oct p.m ph.d prof rep reps sen sept sr st u.k u.n u.s u.s.a va vs wash""".split()  # noqa: SIM905
)
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compare(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def require_langdetect() -> None:
    """Raises UserError where it is not installed."""
    if importlib.util.find_spec("langdetect") is None:
        raise UserError("the reward of IFEval needs langdetect: pip install 'lightning_jax[rewards]'")


def language_of(text: str) -> str | None:
    """The ISO 639-1 code, None for a text without any."""
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws samples of long texts
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def sentences(text: str) -> int:
    """How many sentences: what ends in . ? or ! before a space, if that is not the dot of an abbreviation."""
    count = 0
    for word, following in itertools.pairwise([*text.split(), ""]):
        bare = word.rstrip("\"'”’)]}*_")
        if bare.endswith((".", "?", "!")) and not (following and _continues(bare, following)):
            count += 1
        elif not following:
            count += 1  # the last sentence needs no mark
    return count


def _continues(word: str, following: str) -> bool:
    """Whether the dot at the end of a word does not end its sentence."""
    stem = word.removesuffix(".").lstrip("\"'“‘([{*_").lower()
    lower = following.lstrip("\"'“‘([{*_")[:1].islower()
    if not word.endswith(".") or word == ".":
        return False
    if word.endswith(".."):
        return lower
    return stem in ABBREVIATIONS or (lower and (len(stem) == 1 or stem.replace(",", "").isdigit()))


def capital_words(text: str) -> int:
    """How many words are in capitals alone; the parts of a contraction are words, as in DON'T."""
    parts = re.sub(r"(?i)(n't|'(?:s|m|d|ll|re|ve))\b", r" \1 ", text.replace("’", "'"))
    return sum(word.isupper() for word in re.findall(r"[^\s()\[\]{}<>\"“”,;:!?*`…]+", parts))


def _highlights(text: str) -> int:
    single = (each.strip("*") for each in re.findall(r"\*[^\n*]*\*", text))
    double = (each[2:-2] for each in re.findall(r"\*\*[^\n*]*\*\*", text))
    return sum(bool(each.strip()) for each in (*single, *double))


def _parts(text: str, divider: str) -> list[str] | None:
    """The texts between dividers, where only before the first and behind the last there may be none."""
    first, *middle, last = parts if len(parts := re.split(divider, text)) > 1 else (*parts, "")
    if not all(each.strip() for each in middle):
        return None
    return [each.strip() for each in (first, *middle, last) if each.strip()]


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _parts(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


def _two_responses(text: str) -> bool:
    parts = _parts(text, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = text.split("\n\n")
    count = sum(bool(each.strip()) for each in paragraphs)
    if nth_paragraph > count or not (words := paragraphs[nth_paragraph - 1].split()):
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0]
    return count == num_paragraphs and word.lower() == first_word.lower()


def is_json(text: str) -> bool:
    """Whether a text, without the fence of Markdown, is JSON."""
    text = re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _postscript(text: str, marker: str) -> bool:
    known = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    return bool(re.search(known.get(marker.strip(), re.escape(marker.strip().lower())), text.lower()))


def _bullets(text: str) -> int:
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE))


def placeholders(text: str) -> int:
    """How many [brackets], each closed in its line; in one pass, where a pattern looks from each bracket to the end."""
    count = 0
    for line in text.split("\n"):
        end = 0
        while (start := line.find("[", end)) >= 0 and (close := line.find("]", start)) >= 0:
            count, end = count + 1, close + 1
    return count


def titles(text: str) -> list[str]:
    """What is in <<double angular brackets>>, from the first of a line to the last."""
    lines = ((line, line.find("<<"), line.rfind(">>")) for line in text.split("\n"))
    return [line[start : end + 2] for line, start, end in lines if 0 <= start < end - 2]


def _found(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(_found(re.escape(each), text) for each in keywords),
    "keywords:frequency": lambda text, keyword, relation, frequency: _compare(
        _found(re.escape(keyword.strip()), text), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(_found(rf"\b{re.escape(each)}\b", text) for each in forbidden_words)
    ),
    "keywords:letter_frequency": lambda text, letter, let_relation, let_frequency: _compare(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": lambda text, language: language_of(text) == language,
    "length_constraints:number_sentences": lambda text, relation, num_sentences: _compare(
        sentences(text), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, relation, num_words: _compare(
        len(re.findall(r"\w+", text)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: placeholders(text) >= num_placeholders,
    "detectable_content:postscript": lambda text, postscript_marker: _postscript(text, postscript_marker),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: _bullets(text) == num_bullets,
    "detectable_format:constrained_response": lambda text: any(each in text for each in OPTIONS),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: _highlights(text) >= num_highlights,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:json_format": is_json,
    "detectable_format:title": lambda text: any(each.lstrip("<").rstrip(">").strip() for each in titles(text)),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda text, capital_relation, capital_frequency: _compare(
        capital_words(text), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper() and language_of(text) == "en",
    "change_case:english_lowercase": lambda text: text.islower() and language_of(text) == "en",
    "punctuation:no_comma": lambda text: "," not in text,
}


def follows(
    text: str,
    constraint: str,
    arguments: Mapping[str, Any],
    constraints: Mapping[str, Callable[..., bool]] = CONSTRAINTS,
) -> bool:
    """Whether a text meets a constraint; an empty one meets none.

    Args:
        arguments: as the data name them; None is as good as absent.
        constraints: those that there are.

    Raises:
        UserError: there is no such constraint, or it has other arguments.
    """
    if constraint not in constraints:
        raise UserError(f"there is no constraint {constraint!r}; there are {', '.join(constraints)}")
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        return bool(text.strip()) and constraints[constraint](text, **given)
    except TypeError as error:
        raise UserError(f"constraint {constraint} with arguments {given}: {error}") from None


@dataclass(frozen=True)
class IFEvalReward:
    """One where all constraints of the record are met, its `instruction_id_list` with the `kwargs` of each.

    Raises:
        UserError: langdetect is not installed, which tells languages.
    """

    def __post_init__(self) -> None:
        require_langdetect()

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        return [self._reward(completion) for completion in completions]

    def _reward(self, completion: Completion) -> Reward:
        text = final_part(completion.text)
        names, arguments = required(completion, "instruction_id_list"), required(completion, "kwargs")
        missed = [name for name, given in zip(names, arguments, strict=True) if not follows(text, name, given)]
        return Reward(float(not missed), f"misses {', '.join(missed)}" if missed else f"meets all {len(names)}")
