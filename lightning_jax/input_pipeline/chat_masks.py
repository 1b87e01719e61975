"""Chats to token ids and which of them are trained: what the assistant says, its end token included.

A template tells what the assistant says by `{% generation %}`. For one that does not, a turn is what the chat has more
with the turn than before it with the prompt to answer; this needs a template that writes the beginning of a chat always
the same, and the template's own text behind the turn's last special token is not the assistant's.

The mask goes by role and place alone: no token id, be it of padding or of an end, has a say in it.

Source: transformers' `apply_chat_template(..., return_assistant_tokens_mask=True)` for templates with the tag.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from lightning_jax.input_pipeline.chat_template import (
    END_OF_GENERATED,
    GENERATED,
    ChatTemplate,
    Message,
    mark_texts,
    pieces,
)
from lightning_jax.input_pipeline.chat_templates import open_template, template_tokens
from lightning_jax.input_pipeline.config import DataConfig
from lightning_jax.input_pipeline.readers import Problem
from lightning_jax.input_pipeline.tokenizers import Tokenizer

Span = tuple[int, int]  # of characters: the first, and the one after the last
_TAG = re.compile(r"\{%[-+]?\s*generation\b")


class EncodedChat(NamedTuple):
    """A chat as tokens."""

    ids: np.ndarray  # uint32 [n]
    trained: np.ndarray  # bool [n]


@dataclass(frozen=True)
class ChatEncoder:
    """How chats become tokens.

    Attributes:
      template: Jinja.
      special_tokens: by the names that templates know: bos_token, eos_token.
      turns: which turns of the assistant are trained.
    """

    tokenizer: Tokenizer
    template: str
    special_tokens: Mapping[str, str]
    turns: Literal["all", "last"]

    def encode(
        self, chats: Sequence[Sequence[Message]], tools: Sequence[Any] | None = None
    ) -> list[EncodedChat | Problem]:
        """The tokens of each chat, or why it gives none; many at once cost one process together.

        Args:
          tools: of each chat, as templates read them.

        Raises:
          ChatTemplateError: the template came to no end.
        """
        given = [{"tools": each} for each in tools or [None] * len(chats)]
        chats = mark_texts(self.tokenizer, chats)
        spans = self._by_tags if _TAG.search(self.template) else self._by_turns
        results = spans(chats, given)
        return [each if isinstance(each, Problem) else self._encode(*each) for each in results]

    def _render(
        self, chats: Sequence[Any], given: Sequence[Mapping[str, Any]], generation_marks: tuple[str, str] = ("", "")
    ) -> list[str | Problem]:
        variables = [{"add_generation_prompt": False, **each} for each in given]
        with ChatTemplate(self.template, special_tokens=self.special_tokens) as process:
            texts, problems = process.attempt(chats, variables, generation_marks)
        return [
            Problem("refused by the chat template", problem) if problem else text
            for text, problem in zip(texts, problems, strict=True)
        ]

    def _by_tags(
        self, chats: Sequence[Any], given: Sequence[Mapping[str, Any]]
    ) -> list[tuple[str, list[Span]] | Problem]:
        marked = self._render(chats, given, (GENERATED, END_OF_GENERATED))
        return [text if isinstance(text, Problem) else _take_marks(text) for text in marked]

    def _by_turns(
        self, chats: Sequence[Any], given: Sequence[Mapping[str, Any]]
    ) -> list[tuple[str, list[Span]] | Problem]:
        parts, part_given = [], []
        for chat, each in zip(chats, given, strict=True):
            for turn in _turns(chat):
                parts += [chat[:turn], chat[: turn + 1]]
                part_given += [{**each, "add_generation_prompt": True}, each]
            parts.append(chat)
            part_given.append(each)
        texts = iter(self._render(parts, part_given))
        results: list[tuple[str, list[Span]] | Problem] = []
        for chat in chats:
            before_and_with = [(next(texts), next(texts)) for _ in _turns(chat)]
            whole = next(texts)
            results.append(_turn_spans(before_and_with, whole))
        return results

    def _encode(self, text: str, spans: list[Span]) -> EncodedChat | Problem:
        ids, places = [np.zeros(0, np.uint32)], [np.zeros((0, 2), np.int64)]
        for piece in pieces(self.tokenizer, text):
            own, within = self.tokenizer.encode_spans(piece.text, special=not piece.is_text)
            ids.append(own)
            places.append(within + piece.start)
        ids_N, places_N2 = np.concatenate(ids), np.concatenate(places)
        trained_N = np.zeros(len(ids_N), bool)
        tagged = _TAG.search(self.template)
        for start, stop in spans if self.turns == "all" else spans[-1:]:
            turn = np.flatnonzero((places_N2[:, 1] > start) & (places_N2[:, 0] < stop))
            if not tagged:
                special = np.flatnonzero(np.isin(ids_N[turn], list(self.tokenizer.special_tokens.values())))
                turn = turn[: special[-1] + 1] if len(special) else turn
            trained_N[turn] = True
        if not trained_N[1:].any():
            return Problem("nothing to train on", "the assistant says nothing, as the chat template writes it")
        return EncodedChat(ids_N, trained_N)


def end_of_turn(config: DataConfig, tokenizer: Tokenizer) -> int | None:
    """The token with which the assistant ends its turn; None without a template, or where it writes no special one.

    Raises:
      ChatTemplateError: the template cannot be read, or came to no end.
    """
    if (template := open_template(config)) is None:
        return None
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    (encoded,) = ChatEncoder(tokenizer, template, template_tokens(config), "all").encode([chat])
    last = None if isinstance(encoded, Problem) else int(encoded.ids[np.flatnonzero(encoded.trained)[-1]])
    return last if last in tokenizer.special_tokens.values() else None


def _turns(chat: Sequence[Message]) -> list[int]:
    return [place for place, message in enumerate(chat) if message["role"] == "assistant"]


def _take_marks(marked: str) -> tuple[str, list[Span]]:
    """The text without marks, and what stood between them."""
    text, spans, start = "", [], 0
    for part in re.split(f"([{GENERATED}{END_OF_GENERATED}])", marked):
        if part == GENERATED:
            start = len(text)
        elif part == END_OF_GENERATED:
            spans.append((start, len(text)))
        else:
            text += part
    return text, spans


def _turn_spans(
    before_and_with: list[tuple[str | Problem, str | Problem]], whole: str | Problem
) -> tuple[str, list[Span]] | Problem:
    """The text of a chat, and of every turn of the assistant the part that it adds to what stood before."""
    if isinstance(whole, Problem):
        return whole
    spans = []
    for before, until in before_and_with:
        for text in (before, until):
            if isinstance(text, Problem):
                return text
        if not (until.startswith(before) and whole.startswith(until)):
            return Problem(
                "refused by the chat template",
                "it writes a chat's beginning differently when the chat goes on, so the assistant's turns cannot be "
                "told; put them between {% generation %} and {% endgeneration %} in it",
            )
        spans.append((len(before), len(until)))
    return whole, spans
