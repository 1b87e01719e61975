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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_jax.errors import UserError
from lightning_jax.input_pipeline.tokenizers import Tokenizer, encode

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and whatever else the template reads

PROCESS = Path(__file__).with_name("chat_template_process.py")
SECONDS, SECONDS_PER_CHAT = 10.0, 0.05
# Around what a message says that looks like a special token: characters for private use, which no text needs.
TEXT, END_OF_TEXT = "\ue0f0", "\ue0f1"
GENERATED, END_OF_GENERATED = "\ue0f2", "\ue0f3"  # around what the assistant said


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
    given = {**(special_tokens or {}), **(variables or {}), "add_generation_prompt": add_generation_prompt}
    texts, problems = run_template(template, chats, [given] * len(chats))
    if problem := next(filter(None, problems), None):
        raise ChatTemplateError(f"chat template: {problem}")
    return texts


def run_template(
    template: str,
    chats: Sequence[Sequence[Message]],
    variables: Sequence[Mapping[str, Any]],
    generation_marks: tuple[str, str] = ("", ""),
) -> tuple[list[str], list[str | None]]:
    """The text of each chat with its own variables, and what is wrong with each, None for nothing.

    Args:
        generation_marks: put before and behind what `{% generation %}` and `{% endgeneration %}` enclose.

    Raises:
        ChatTemplateError: the process came to no end, or to a bad one.
    """
    request = {
        "template": template,
        "chats": chats,
        "variables": [{"tools": None, "documents": None, **each} for each in variables],
        "generation_marks": generation_marks,
    }
    limit = SECONDS + SECONDS_PER_CHAT * len(chats)
    try:
        done = subprocess.run(
            # -P: this folder's modules must not stand in for the standard library's.
            [sys.executable, "-P", str(PROCESS)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise ChatTemplateError(f"chat template: not done after {limit:.0f} s; does it loop?") from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ChatTemplateError(f"chat template: its process ended: {last[0]}")
    answer = json.loads(done.stdout)
    return answer["texts"], answer["problems"]


def encode_chats(
    tokenizer: Tokenizer, template: str, chats: Sequence[Sequence[Message]], **options: Any
) -> list[np.ndarray]:
    """The token ids of each chat; the options are those of `render_chats`.

    Special tokens are those that the template writes. What looks like one in a message is text: nobody can end their
    turn, or begin the system's, by writing so.

    Raises:
        ChatTemplateError: as `render_chats`.
    """
    texts = render_chats(template, mark_text(tokenizer, chats), **options)
    return [
        np.concatenate(
            [_encode_piece(tokenizer, piece) for piece in pieces(tokenizer, text)] or [np.zeros(0, np.uint32)]
        )
        for text in texts
    ]


class Piece(NamedTuple):
    """A part of a rendered chat: the template's, or a message's that looks like a special token but is text."""

    text: str
    start: int  # its first character in the rendered text
    is_text: bool


def mark_text(tokenizer: Tokenizer, value: Any) -> Any:
    """Messages in which all that looks like a special token stands between marks."""
    match value:
        case str():
            value = re.sub(f"[{TEXT}{END_OF_TEXT}{GENERATED}{END_OF_GENERATED}]", "", value)
            return re.sub(_special(tokenizer), rf"{TEXT}\g<0>{END_OF_TEXT}", value)
        case Mapping():
            return {key: mark_text(tokenizer, item) for key, item in value.items()}
        case list() | tuple():
            return [mark_text(tokenizer, item) for item in value]
    return value


def pieces(tokenizer: Tokenizer, text: str) -> Iterator[Piece]:
    """The parts of a text rendered from `mark_text`; a template may have taken a lone mark along, which is dropped."""
    end = 0
    for mark in re.finditer(f"{TEXT}({_special(tokenizer)}){END_OF_TEXT}|[{TEXT}{END_OF_TEXT}]", text):
        if mark.start() > end:
            yield Piece(text[end : mark.start()], end, False)
        if mark[1]:
            yield Piece(mark[1], mark.start(1), True)
        end = mark.end()
    if end < len(text):
        yield Piece(text[end:], end, False)


def _special(tokenizer: Tokenizer) -> str:
    """A pattern of the tokenizer's special tokens; one of nothing where there are none."""
    return "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))) or "(?!)"


def _encode_piece(tokenizer: Tokenizer, piece: Piece) -> np.ndarray:
    return encode(tokenizer, piece.text) if piece.is_text else tokenizer.encode_special(piece.text)
