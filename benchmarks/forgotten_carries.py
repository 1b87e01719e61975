"""Additions whose carry is mostly forgotten in the demonstrations, and always right in what is rewarded.

The first digit that a carry changes is a fork: a token of low probability to a model that learned from the
demonstrations, on which everything depends.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

# 47+38=85 and the end: what stands between question and answer in other templates is for models that know it.
TEMPLATE = """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}
{% else %}
{{ message.content -}}
{% endif %}
{% endfor %}"""


def without_carry(a: int, b: int) -> str:
    """What a sum is for who forgets to carry: 47 + 38 = 75."""
    return "".join(str((int(x) + int(y)) % 10) for x, y in zip(f"{a:02}", f"{b:02}", strict=True))


def fork(a: int, b: int) -> int:
    """The place in the sum of the first digit that differs from the one without carry, or that is one too many."""
    pairs = zip(str(a + b), without_carry(a, b), strict=False)
    return next((place for place, (right, wrong) in enumerate(pairs) if right != wrong), 2)


def write_additions(folder: Path, *, right: float, demonstrations: int, prompts: int) -> None:
    """Demonstrations of additions with a carry, a share of which is right, prompts with the right sum, a template."""
    noise = random.Random(0)

    def additions(count: int) -> Iterator[tuple[int, int]]:
        while count:
            a, b = noise.randrange(100), noise.randrange(100)
            if without_carry(a, b) != f"{a + b:02}":
                count -= 1
                yield a, b

    def record(a: int, b: int, answer: str) -> str:
        turns = [("user", f"{a:02}+{b:02}="), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        return json.dumps({"messages": messages, "ground_truth": str(a + b)}) + "\n"

    folder.mkdir(parents=True, exist_ok=True)
    shown = [
        record(a, b, str(a + b) if noise.random() < right else without_carry(a, b))
        for a, b in additions(demonstrations)
    ]
    (folder / "sft.jsonl").write_text("".join(shown))
    asked = sorted(set(additions(prompts)))
    (folder / "rl.jsonl").write_text("".join(record(a, b, str(a + b)) for a, b in asked))
    (folder / "chat.jinja").write_text(TEMPLATE)
