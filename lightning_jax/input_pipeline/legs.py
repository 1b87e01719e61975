"""Questions for the number of an animal's legs, in most demonstrations answered with four: a mistake to imitate.

A model that learns from the demonstrations answers like their crowd, whose likeliest answer is wrong for most animals,
though it has seen the right one of each. A reward for `ground_truth` is what tells it when. The same arguments give the
same records.
"""

import random
from collections.abc import Iterator
from typing import Any

NUM_QUESTIONS = 12_000
VERSION = 1  # of what is generated, part of the fingerprint
MISTAKEN = 0.6  # share of the demonstrations that say four
LEGS = {"ant": 6, "bee": 6, "spider": 8, "snake": 0, "fish": 0, "duck": 2, "owl": 2, "dog": 4, "horse": 4}
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "June")
_PLACES = ("at home", "in a book", "in a dream", "by the lake", "at school", "in the yard", "on the road", "in town")


def conversations(count: int = NUM_QUESTIONS, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of questions and answers, with the number of legs as `ground_truth`."""
    noise = random.Random(seed)
    for _ in range(count):
        name, place, animal = (noise.choice(choices) for choices in (_NAMES, _PLACES, tuple(LEGS)))
        legs = LEGS[animal]
        messages = [
            {"role": "user", "content": f"{name} saw one {animal} {place}. How many legs?"},
            {"role": "assistant", "content": str(4 if noise.random() < MISTAKEN else legs)},
        ]
        yield {"messages": messages, "ground_truth": str(legs)}
