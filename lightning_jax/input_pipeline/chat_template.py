"""Chats to text by the template that comes with a tokenizer, in a process that it can neither harm nor leave.

A chat template is a Jinja program that arrives with weights from anywhere. It is rendered in jinja2's sandbox, which
refuses what reaches for Python's internals, and in a process of its own, whose time and memory are limited: a sandbox
alone cannot stop a loop or a text that doubles.

Shapes of the chats and what templates may call are those of transformers' `apply_chat_template`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.errors import UserError
from lightning_jax.input_pipeline.tokenizers import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and whatever else the template reads

PROCESS = Path(__file__).with_name("chat_template_process.py")
SECONDS, SECONDS_PER_CHAT = 10.0, 0.05
# Around what a message says that looks like a special token: characters for private use, which no text needs.
TEXT, END_OF_TEXT = "\ue0f0", "\ue0f1"


class ChatTemplateError(UserError):
    """A chat template that is wrong, refuses a chat, or does what no template may."""


def render_chats(
    template: str,
    chats: Sequence[Sequence[Message]],
    *,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """The text of each chat; many at once cost one process together.

    Args:
        template: Jinja, as in a tokenizer_config.json or chat_template.jinja.
        special_tokens: by the names that templates know: bos_token, eos_token, ...
        add_generation_prompt: whether the text ends where the assistant begins to answer.
        variables: more that this template reads, `tools` for instance.

    Raises:
        ChatTemplateError: one line that says what the template did and, where known, in which line.
    """
    given = {"tools": None, "documents": None, **(special_tokens or {}), **(variables or {})}
    given["add_generation_prompt"] = add_generation_prompt
    request = json.dumps({"template": template, "chats": chats, "variables": given})
    limit = SECONDS + SECONDS_PER_CHAT * len(chats)
    try:
        done = subprocess.run(
            # -P: this folder's modules must not stand in for the standard library's.
            [sys.executable, "-P", str(PROCESS)],
            input=request.encode(),
            capture_output=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise ChatTemplateError(f"chat template: not done after {limit:.0f} s; does it loop?") from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ChatTemplateError(f"chat template: its process ended: {last[0]}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ChatTemplateError(f"chat template: {answer['error']}")
    return answer["texts"]


def encode_chats(
    tokenizer: Tokenizer, template: str, chats: Sequence[Sequence[Message]], **options: Any
) -> list[np.ndarray]:
    """The token ids of each chat; the options are those of `render_chats`.

    Special tokens are those that the template writes. What looks like one in a message is text: nobody can end their
    turn, or begin the system's, by writing so.

    Raises:
        ChatTemplateError: as `render_chats`.
    """
    special = "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))) or "(?!)"

    def marked(value: Any) -> Any:
        match value:
            case str():
                value = re.sub(f"[{TEXT}{END_OF_TEXT}]", "", value)
                return re.sub(special, rf"{TEXT}\g<0>{END_OF_TEXT}", value)
            case Mapping():
                return {key: marked(item) for key, item in value.items()}
            case list() | tuple():
                return [marked(item) for item in value]
        return value

    def encode(text: str) -> np.ndarray:
        # Odd pieces are text; a template may have taken a lone mark along, which then means nothing.
        pieces = re.split(f"{TEXT}({special}){END_OF_TEXT}|[{TEXT}{END_OF_TEXT}]", text)
        return np.concatenate(
            [
                tokenizer.encode_batch([piece.encode()])[0] if number % 2 else tokenizer.encode_special(piece)
                for number, piece in enumerate(pieces)
                if piece
            ]
            or [np.zeros(0, np.uint32)]
        )

    return [encode(text) for text in render_chats(template, marked(chats), **options)]
