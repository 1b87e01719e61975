"""Chats to text by the template that comes with a tokenizer, in a process that it can neither harm nor leave.

A chat template is a Jinja program that arrives with weights from anywhere. It is rendered in jinja2's sandbox, which
refuses what reaches for Python's internals, and in a process of its own, whose time and memory are limited: a sandbox
alone cannot stop a loop or a text that doubles.

Shapes of the chats and what templates may call are those of transformers' `apply_chat_template`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from lightning_jax.errors import UserError
from lightning_jax.input_pipeline.tokenizers import Tokenizer, encode
from lightning_jax.json_process import JSONProcess, ProcessEnded, ProcessTimeout

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and whatever else the template reads

PROCESS = Path(__file__).with_name("chat_template_process.py")
SECONDS, SECONDS_PER_CHAT = 10.0, 0.05
# Around what a message says that looks like a special token: characters for private use, which no text needs.
TEXT, END_OF_TEXT = "\ue0f0", "\ue0f1"
GENERATED, END_OF_GENERATED = "\ue0f2", "\ue0f3"  # around what the assistant said
CONTINUED = "\ue0f4"  # behind a message that is only begun
MARKS = TEXT + END_OF_TEXT + GENERATED + END_OF_GENERATED + CONTINUED


class ChatTemplateError(UserError):
    """A chat template that is wrong, refuses a chat, or does what no template may."""


class ChatTemplate:
    """A template at work in a process of its own, which ends with the `with` block.

    Args:
        template: Jinja, as in a tokenizer_config.json or chat_template.jinja.
        special_tokens: by the names that templates know: bos_token, eos_token, ...
        variables: more that this template reads, `tools` for instance.
    """

    def __init__(
        self,
        template: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
    ):
        self.template = template
        self._variables = {"tools": None, "documents": None, **(special_tokens or {}), **(variables or {})}
        self._process = JSONProcess(PROCESS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def render(
        self, chats: Sequence[Sequence[Message]], *, add_generation_prompt: bool, continue_final_message: bool = False
    ) -> list[str]:
        """The text of each chat.

        Args:
            add_generation_prompt: whether the text ends where the assistant begins to answer.
            continue_final_message: whether it ends with what the last message says, which is only begun.

        Raises:
            ChatTemplateError: one line that says what the template did and, where known, in which line. No more can
                be rendered where it did not end.
        """
        if continue_final_message:
            # The space tells whether the template cuts spaces off.
            chats = [[*chat, {**last, "content": f"{last['content']}{CONTINUED} "}] for *chat, last in chats]
        texts, problems = self.attempt(chats, [{"add_generation_prompt": add_generation_prompt}] * len(chats))
        if problem := next(filter(None, problems), None):
            raise ChatTemplateError(f"chat template: {problem}")
        return [_until_continued(text) for text in texts] if continue_final_message else texts

    def attempt(
        self,
        chats: Sequence[Sequence[Message]],
        variables: Sequence[Mapping[str, Any]],
        generation_marks: tuple[str, str] = ("", ""),
    ) -> tuple[list[str], list[str | None]]:
        """The text of each chat with variables of its own, and what is wrong with each, None for nothing.

        Args:
            generation_marks: put before and behind what `{% generation %}` and `{% endgeneration %}` enclose.

        Raises:
            ChatTemplateError: the process came to no end, or to a bad one.
        """
        request = {
            "template": self.template,
            "chats": chats,
            "variables": [{**self._variables, **each} for each in variables],
            "generation_marks": generation_marks,
        }
        limit = SECONDS + SECONDS_PER_CHAT * len(chats)
        try:
            answer = self._process.ask(request, limit)
        except ProcessTimeout:
            raise ChatTemplateError(f"chat template: not done after {limit:.0f} s; does it loop?") from None
        except ProcessEnded as ended:
            raise ChatTemplateError(f"chat template: its process ended: {ended}") from None
        return answer["texts"], answer["problems"]


def _until_continued(text: str) -> str:
    before, mark, behind = text.rpartition(CONTINUED)
    if not mark:
        raise ChatTemplateError("chat template: it does not write the last message, which is to be continued")
    return before if behind.startswith(" ") else before.rstrip()


def render_chats(
    template: str, chats: Sequence[Sequence[Message]], *, add_generation_prompt: bool, **given: Any
) -> list[str]:
    """The text of each chat, as `ChatTemplate(template, **given)` renders it.

    Raises:
        ChatTemplateError: as `ChatTemplate.render`.
    """
    with ChatTemplate(template, **given) as process:
        return process.render(chats, add_generation_prompt=add_generation_prompt)


def encode_chats(
    tokenizer: Tokenizer, template: str, chats: Sequence[Sequence[Message]], **options: Any
) -> list[np.ndarray]:
    """The token ids of each chat; the options are those of `render_chats`.

    Special tokens are those that the template writes. What looks like one in a message is text: nobody can end their
    turn, or begin the system's, by writing so.

    Raises:
        ChatTemplateError: as `render_chats`.
    """
    texts = render_chats(template, mark_texts(tokenizer, chats), **options)
    return [encode_rendered(tokenizer, text) for text in texts]


class Piece(NamedTuple):
    """A part of a rendered chat: the template's, or a message's that looks like a special token but is text."""

    text: str
    start: int  # its first character in the rendered text
    is_text: bool


def mark_texts(tokenizer: Tokenizer, value: Any) -> Any:
    """What is said, a string or anything of strings, with marks for `pieces` around all that looks special."""
    match value:
        case str():
            value = re.sub(f"[{MARKS}]", "", value)
            return re.sub(_special(tokenizer), rf"{TEXT}\g<0>{END_OF_TEXT}", value)
        case Mapping():
            return {key: mark_texts(tokenizer, item) for key, item in value.items()}
        case list() | tuple():
            return [mark_texts(tokenizer, item) for item in value]
    return value


def pieces(tokenizer: Tokenizer, text: str) -> Iterator[Piece]:
    """The parts of a text rendered from `mark_texts`; a template may have taken a lone mark along, which is dropped."""
    end = 0
    for mark in re.finditer(f"{TEXT}({_special(tokenizer)}){END_OF_TEXT}|[{TEXT}{END_OF_TEXT}]", text):
        if mark.start() > end:
            yield Piece(text[end : mark.start()], end, False)
        if mark[1]:
            yield Piece(mark[1], mark.start(1), True)
        end = mark.end()
    if end < len(text):
        yield Piece(text[end:], end, False)


def encode_rendered(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a text in which special tokens are what they are, but for those between marks."""
    ids = [
        encode(tokenizer, piece.text) if piece.is_text else tokenizer.encode_special(piece.text)
        for piece in pieces(tokenizer, text)
    ]
    return np.concatenate(ids or [np.zeros(0, np.uint32)])


def _special(tokenizer: Tokenizer) -> str:
    """A pattern of the tokenizer's special tokens; one of nothing where there are none."""
    return "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))) or "(?!)"
