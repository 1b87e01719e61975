"""Additions whose carry is mostly forgotten in the demonstrations, and always right in what is rewarded.

The first token that a carry changes is a fork: of low probability to a model that learned from the demonstrations, and
everything depends on it. A sum is said at once, 47+38=85, or worked out, 7+8=15 4+3+1=8 85: there the answer is long,
and all but the fork is easy.
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


def answer(a: int, b: int, *, carry: bool, worked: bool) -> str:
    """What a sum is, or what it is for who forgets to carry: 47 + 38 = 75."""
    units, tens = a % 10 + b % 10, a // 10 + b // 10
    carried = carry and units > 9
    total = (tens + carried) * 10 + units % 10
    if not carry and not worked:
        total = tens % 10 * 10 + units % 10
    said = f"{total:02}"
    return f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}{'+1' * carried}={tens + carried} {said}" if worked else said


def fork(a: int, b: int, *, worked: bool) -> int:
    """The place in the right answer of the first character that differs from the forgetful one, or is one too many."""
    right, wrong = (answer(a, b, carry=carry, worked=worked) for carry in (True, False))
    pairs = zip(right, wrong, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(wrong))


def write_additions(folder: Path, *, right: float, worked: bool, demonstrations: int, prompts: int) -> None:
    """Demonstrations of additions with a carry, a share of which is right, prompts with the right sum, a template."""
    noise = random.Random(0)

    def additions(count: int) -> Iterator[tuple[int, int]]:
        while count:
            a, b = noise.randrange(100), noise.randrange(100)
            if answer(a, b, carry=True, worked=worked) != answer(a, b, carry=False, worked=worked):
                count -= 1
                yield a, b

    def record(a: int, b: int, *, carry: bool) -> str:
        turns = [("user", f"{a:02}+{b:02}="), ("assistant", answer(a, b, carry=carry, worked=worked))]
        messages = [{"role": role, "content": content} for role, content in turns]
        return json.dumps({"messages": messages, "ground_truth": str(a + b)}) + "\n"

    folder.mkdir(parents=True, exist_ok=True)
    shown = [record(a, b, carry=noise.random() < right) for a, b in additions(demonstrations)]
    (folder / "sft.jsonl").write_text("".join(shown))
    asked = sorted(set(additions(prompts)))
    (folder / "rl.jsonl").write_text("".join(record(a, b, carry=True) for a, b in asked))
    (folder / "chat.jinja").write_text(TEMPLATE)
