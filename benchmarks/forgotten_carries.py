"""Additions whose carry is mostly forgotten in the demonstrations, and always right in what is rewarded.

An answer works the sum out, 47+38=7+8=15 4+3+1=8 85. The first character that the carry changes is a fork: of low
probability to a model that learned from the demonstrations, in an answer of which all else is easy.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

# What stands between question and answer in other templates is for models that know it.
TEMPLATE = """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}
{% else %}
{{ message.content -}}
{% endif %}
{% endfor %}"""


def answer(a: int, b: int, *, carry: bool) -> str:
    """A sum worked out, or by who forgets to carry: 7+8=15 4+3+1=8 85, or 7+8=15 4+3=7 75."""
    units, carried = a % 10 + b % 10, carry and a % 10 + b % 10 > 9
    tens = a // 10 + b // 10 + carried
    return f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}{'+1' * carried}={tens} {tens * 10 + units % 10:02}"


def fork(a: int, b: int) -> int:
    """The place in the right answer of the first character that differs from the forgetful one."""
    pairs = zip(answer(a, b, carry=True), answer(a, b, carry=False), strict=False)
    return next(place for place, (right, wrong) in enumerate(pairs) if right != wrong)


def write_additions(folder: Path, *, right: float, demonstrations: int, prompts: int) -> None:
    """Demonstrations of additions with a carry, a share of which is right, prompts with the right sum, a template."""
    noise = random.Random(0)

    def additions(count: int) -> Iterator[tuple[int, int]]:
        while count:
            a, b = noise.randrange(100), noise.randrange(100)
            if a % 10 + b % 10 > 9:
                count -= 1
                yield a, b

    def record(a: int, b: int, *, carry: bool) -> str:
        turns = [("user", f"{a:02}+{b:02}="), ("assistant", answer(a, b, carry=carry))]
        messages = [{"role": role, "content": content} for role, content in turns]
        return json.dumps({"messages": messages, "ground_truth": str(a + b)}) + "\n"

    folder.mkdir(parents=True, exist_ok=True)
    shown = [record(a, b, carry=noise.random() < right) for a, b in additions(demonstrations)]
    (folder / "sft.jsonl").write_text("".join(shown))
    asked = sorted(set(additions(prompts)))
    (folder / "rl.jsonl").write_text("".join(record(a, b, carry=True) for a, b in asked))
    (folder / "chat.jinja").write_text(TEMPLATE)
