"""Documents to what a token store keeps of them: text with bos and eos around it, chats by their template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lightning_jax.input_pipeline.chat_masks import ChatEncoder, EncodedChat
from lightning_jax.input_pipeline.chat_records import CHATS_PER_EXAMPLE, prompt, read_document
from lightning_jax.input_pipeline.chat_template import ChatTemplateError
from lightning_jax.input_pipeline.chat_templates import open_template, template_tokens
from lightning_jax.input_pipeline.config import DataConfig
from lightning_jax.input_pipeline.readers import Problem
from lightning_jax.input_pipeline.token_store import MARGINS, TRAINED
from lightning_jax.input_pipeline.tokenizers import Tokenizer, encode_documents


class Example(NamedTuple):
    """What one record gives: a text, a chat, or the chosen and the rejected chat of a preference."""

    tokens: np.ndarray  # [tokens] of all its documents
    lengths: np.ndarray  # [documents]
    trained: np.ndarray | None  # bool [tokens]; None for text
    margins: np.ndarray | None  # [documents]; preferences only
    identity: bytes  # what decides whether it is held out


class TextEncoder:
    """The encoder of text."""

    files: tuple[str, ...] = ()  # of a token store, besides tokens and offsets
    description = ""  # of all that its result depends on, besides the tokenizer

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode(self, documents: Sequence[bytes]) -> list[Example | Problem]:
        tokens, lengths = encode_documents(self._tokenizer, documents)
        pieces = np.split(tokens, np.cumsum(lengths)[:-1])
        return [
            Example(piece, lengths[place : place + 1], None, None, document)
            for place, (piece, document) in enumerate(zip(pieces, documents, strict=True))
        ]


@dataclass(frozen=True)
class ChatsEncoder:
    """The encoder of conversations and preferences, whose documents are those of `chat_document`."""

    chats: ChatEncoder
    chats_per_example: int

    @property
    def files(self) -> tuple[str, ...]:
        return (TRAINED, MARGINS) if self.chats_per_example == 2 else (TRAINED,)

    @property
    def description(self) -> str:
        return repr((self.chats.template, sorted(self.chats.special_tokens.items()), self.chats.turns))

    def encode(self, documents: Sequence[bytes]) -> list[Example | Problem]:
        read = [read_document(document) for document in documents]
        chats = [chat for each in read for chat in each["chats"]]
        tools = [each["tools"] for each in read for _ in each["chats"]]
        encoded = iter(self.chats.encode(chats, tools))
        results: list[Example | Problem] = []
        for document, each in zip(documents, read, strict=True):
            own = [next(encoded) for _ in each["chats"]]
            problems = [chat for chat in own if isinstance(chat, Problem)]
            results.append(problems[0] if problems else self._example(own, each["margin"], prompt(document)))
        return results

    def _example(self, chats: list[EncodedChat], margin: float, identity: bytes) -> Example:
        return Example(
            np.concatenate([chat.ids for chat in chats]),
            np.array([len(chat.ids) for chat in chats]),
            np.concatenate([chat.trained for chat in chats]),
            np.full(len(chats), margin, np.float32) if self.chats_per_example == 2 else None,
            identity,
        )


def make_encoder(name: str, config: DataConfig, tokenizer: Tokenizer) -> TextEncoder | ChatsEncoder:
    """The encoder of the corpus `name`.

    Raises:
      ChatTemplateError: the corpus is chats, and there is no template, or it cannot be read.
    """
    corpus = config.corpora[name]
    if corpus.content == "text":
        return TextEncoder(tokenizer)
    template = open_template(config)
    if template is None:
        raise ChatTemplateError(
            f"data.chat_template: there is none beside {config.tokenizer.path}, and corpora.{name} is chats; name one"
        )
    chats = ChatEncoder(tokenizer, template, template_tokens(config), corpus.turns)
    return ChatsEncoder(chats, CHATS_PER_EXAMPLE[corpus.content])
