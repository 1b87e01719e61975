"""The tasks that are made here, by the name that a config calls them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lightning_jax.input_pipeline import legs, word_problems


class GeneratedTask(NamedTuple):
    """Records that are the same everywhere.

    Attributes:
      size: how many there are.
      version: of what is generated, part of the fingerprint.
      records: makes them, by content.
    """

    size: int
    version: int
    records: Mapping[str, Callable[[], Iterator[dict[str, Any]]]]


TASKS = {
    "arithmetic": GeneratedTask(
        word_problems.NUM_PROBLEMS,
        word_problems.VERSION,
        {"conversations": word_problems.conversations, "preferences": word_problems.preferences},
    ),
    "legs": GeneratedTask(legs.NUM_QUESTIONS, legs.VERSION, {"conversations": legs.conversations}),
}
