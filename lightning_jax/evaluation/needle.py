"""Needle in a haystack: a number told once, anywhere in a long text, is asked for at its end.

The haystack is running text of the corpus that comes with the package. Each trial has its own numbers and its own place
in that text, all a function of the seed. Two scores:
  choice       the right number has a higher log-likelihood than every distractor (numbers that stand nowhere in the
               prompt); the text is computed once for all of them;
  exact_match  greedy generation gives the right number.
Both go on from the state that generation keeps.

Source: the test of G. Kamradt (2023), as numbers to be retrieved in RULER (arXiv 2404.06654) section 3.
"""

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lightning_jax.errors import UserError
from lightning_jax.evaluation.scoring import Scorer, encode_pair, start_ids
from lightning_jax.generation import Sampling
from lightning_jax.input_pipeline import Tokenizer, encode

NEEDLE = "\nThe secret number of {place} is {number}.\n"
QUESTION = "\nWhat is the secret number of {place}? The secret number of {place} is"
ANSWER = " {number}"
PLACES = ("Lisbon", "Nairobi", "Hanoi", "Quito", "Oslo", "Perth", "Tunis", "Osaka", "Lima", "Sofia")


@dataclass(frozen=True)
class NeedleSettings:
    """What is asked.

    Attributes:
        lengths: tokens of prompt and answer together.
        depths: where the needle stands, in percent of the haystack: 0 is its beginning, 100 its end.
        trials: questions for each length and depth.
        distractors: wrong numbers beside the right one.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int = 4
    distractors: int = 7
    seed: int = 0

    def problems(self) -> list[str]:
        """What is wrong, one line each: "field: what is wrong; what would be right"."""
        found = [f"lengths: {length} is not positive" for length in self.lengths if length < 1]
        found += [f"depths: {depth:g} is no percentage; 0 to 100" for depth in self.depths if not 0 <= depth <= 100]
        found += [f"{name}: none; name at least one" for name in ("lengths", "depths") if not getattr(self, name)]
        found += [
            f"{name}: {getattr(self, name)} is too few; at least 1"
            for name in ("trials", "distractors")
            if getattr(self, name) < 1
        ]
        return found


class Trial(NamedTuple):
    """One question: the tokens of its prompt and of each candidate, the right one first, which is the answer."""

    length: int
    depth: float
    prompt: np.ndarray
    candidates: list[np.ndarray]
    answer: str


class Haystack:
    """Running text as the tokens of its lines, to be cut at their borders."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer):
        lines = [line.encode("utf-8") for text in texts for line in text.splitlines(keepends=True)]
        encoded = tokenizer.encode_batch(lines)
        self.tokens = np.concatenate(encoded).astype(np.int32)
        self.line_starts = np.cumsum([0, *map(len, encoded[:-1])])

    def cut(self, length: int, dice: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens from the beginning of some line on, and the places in them where lines begin."""
        last = np.searchsorted(self.line_starts, len(self.tokens) - length, side="right")
        if not last:
            raise UserError(f"needle: {length:,} tokens are more than the haystack has, which are {len(self.tokens):,}")
        start = self.line_starts[dice.randrange(int(last))]
        starts = self.line_starts[(self.line_starts >= start) & (self.line_starts < start + length)]
        return self.tokens[start : start + length], starts - start


def make_trial(
    haystack: Haystack, tokenizer: Tokenizer, settings: NeedleSettings, length: int, depth: float, trial: int
) -> Trial:
    """The trial of this number; prompt and right answer have `length` tokens together.

    Raises:
        UserError: the length has no room for needle, question and answer.
    """
    dice = random.Random(f"{settings.seed}, {length}, {depth:g}, {trial}")
    place = dice.choice(PLACES)
    numbers = dice.sample(range(1_000_000, 10_000_000), settings.distractors + 1)
    encode_text = functools.partial(encode, tokenizer)
    needle = encode_text(NEEDLE.format(place=place, number=numbers[0]))
    pairs = [encode_pair(encode_text, QUESTION.format(place=place), ANSWER.format(number=number)) for number in numbers]
    question, candidates = pairs[0][0], [candidate for _, candidate in pairs]
    start = start_ids(tokenizer)
    around = sum(map(len, (start, needle, question, candidates[0])))
    if length < around:
        raise UserError(f"needle: {length} tokens have no room for needle and question, which take {around}")
    hay, line_starts = haystack.cut(length - around, dice)
    borders = np.append(line_starts, len(hay))
    at = borders[np.abs(borders - depth / 100 * len(hay)).argmin()]
    prompt = np.concatenate([start, hay[:at], needle, hay[at:], question]).astype(np.int32)
    return Trial(length, depth, prompt, candidates, str(numbers[0]))


def make_trials(texts: Sequence[str], tokenizer: Tokenizer, settings: NeedleSettings) -> dict[int, list[Trial]]:
    """The trials of each length, those of one depth one after the other.

    Args:
        texts: the haystack.

    Raises:
        UserError: a length without room for the question, or longer than the haystack; a line for each.
    """
    haystack = Haystack(texts, tokenizer)
    trials: dict[int, list[Trial]] = {}
    problems = []
    for length in settings.lengths:
        try:
            trials[length] = [
                make_trial(haystack, tokenizer, settings, length, depth, trial)
                for depth in settings.depths
                for trial in range(settings.trials)
            ]
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))
    return trials


def needle_in_a_haystack(scorer: Scorer, trials: Sequence[Trial]) -> dict[str, Any]:
    """The shares of trials that were answered.

    Returns:
        `cells`, a mapping for each length and depth: `choice` and `exact_match` as shares of its trials, and
        `answer_nats`, the mean of the right number's negative log-likelihood.
    """
    outcomes = zip(trials, _choices(scorer, trials), _exact_matches(scorer, trials), strict=True)
    cells = []
    for (length, depth), cell in itertools.groupby(outcomes, lambda outcome: (outcome[0].length, outcome[0].depth)):
        _, choices, exact = zip(*cell, strict=True)
        chosen, nats = zip(*choices, strict=True)
        cells.append(
            {
                "length": length,
                "depth": depth,
                "choice": float(np.mean(chosen)),
                "exact_match": float(np.mean(exact)),
                "answer_nats": float(np.mean(nats)),
            }
        )
    return {"cells": cells}


def _choices(scorer: Scorer, trials: Sequence[Trial]) -> list[tuple[bool, float]]:
    """Whether the right number is the likeliest candidate, and its negative log-likelihood in nats."""
    scores = scorer.score_continuations([trial.prompt for trial in trials], [trial.candidates for trial in trials])
    return [(right > max(wrong), -right) for right, *wrong in scores]


def _exact_matches(scorer: Scorer, trials: Sequence[Trial]) -> list[bool]:
    """Whether the greedy continuation, of as many tokens as the right answer has, is the right answer."""
    samplings = [Sampling(max_new_tokens=len(trial.candidates[0]), temperature=0) for trial in trials]
    generated = scorer.continuations([trial.prompt for trial in trials], samplings)
    return [text.strip() == trial.answer for text, trial in zip(generated, trials, strict=True)]
