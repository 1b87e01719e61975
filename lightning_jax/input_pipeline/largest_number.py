"""Questions for the largest of three numbers, answered by guesses: what imitation cannot teach and a reward can.

A demonstration answers with any of the three. A model that imitates it learns what an answer looks like and is right
one time in three; which of the numbers is right, only `ground_truth` says. The same arguments give the same questions,
no three numbers twice.
"""

import random
from collections.abc import Iterator
from typing import Any

NUM_QUESTIONS = 12_000
VERSION = 1  # of what is generated, part of the fingerprint
_NUMBERS = range(10, 100)


def conversations(count: int = NUM_QUESTIONS, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of questions and guesses, with the largest number as `ground_truth`."""
    noise, seen = random.Random(seed), set()
    while len(seen) < count:
        numbers = noise.sample(_NUMBERS, 3)
        guess = noise.choice(numbers)
        if (unordered := frozenset(numbers)) not in seen:
            seen.add(unordered)
            question = f"Which is the largest: {', '.join(map(str, numbers))}?"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": str(guess)}]
            yield {"messages": messages, "ground_truth": str(max(numbers))}
