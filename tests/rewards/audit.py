"""What every verifier is asked before it may train a model: gold is 1, garbage 0, constants 0, and nothing raises."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_jax.rewards import Completion, RewardFunction

GARBAGE = (
    "",
    " \n\t ",
    "\x00\x01",
    "I do not know.",
    "<think>",
    "</think>",
    "<answer></answer>",
    "{" * 200,
    "[" * 200 + "]" * 200,
    "((((",
    r"\boxed{",
    r"\boxed{}",
    r"\frac{}{}",
    "$$",
    "```python\n",
    '{"a": ',
    "é😀漢字",
    "-" * 500,
    ", ".join("abc"),
    "NaN",
    "inf",
    "None",
    "__import__('os')",
)
CONSTANTS = ("0", "-1", "True", "A", "yes", "[]", "[0]", "0 0", "x")


def completion(text: str, **record: Any) -> Completion:
    return Completion([{"role": "user", "content": "?"}], text, len(text) + 1, True, record)


def assert_audited(
    reward: RewardFunction, record: Mapping[str, Any], gold: Iterable[str], wrong: Iterable[str] = ()
) -> None:
    """Passes where the gold texts score 1 and all others 0; a constant that is gold is no constant here."""
    gold = list(gold)
    others = [text for text in (*GARBAGE, *CONSTANTS, *wrong) if text not in gold]
    scores = [each.score for each in reward([completion(text, **record) for text in gold + others])]
    bad = {text: score for text, score in zip(gold + others, scores, strict=True) if score != float(text in gold)}
    assert not bad
