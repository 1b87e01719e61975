"""Tokenizers: text to token ids and back; bytes, a tokenizer.json, or byte-level BPE trained on the corpora.

There is no padding token: padding is a matter of the rows, marked by segment id 0, and no id stands for it. What looks
like a special token inside a document ("</s>") is text like any other.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from lightning_jax.input_pipeline.config import TokenizerConfig
from lightning_jax.input_pipeline.errors import TokenizerError
from lightning_jax.input_pipeline.readers import nearest


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer.

    Attributes:
      vocab_size: every id is below.
      bos_id, eos_id: put before and after each document; None for not at all.
      special_tokens: the ids of tokens that are no text of a document, by how a chat template writes them.
      fingerprint: equal for tokenizers that give equal ids.
    """

    special_tokens: dict[str, int]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each UTF-8 text, without bos and eos."""

    def encode_special(self, text: str) -> np.ndarray:
        """The ids of a text in which special tokens that are written out are those tokens."""

    def encode_spans(self, text: str, *, special: bool) -> tuple[np.ndarray, np.ndarray]:
        """The ids [n] of a text and the characters [n, 2] that each stands for, from the first to before the last.

        Args:
          special: as `encode_special`, or else as `encode_batch`.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; special tokens give none, bytes that are not UTF-8 give U+FFFD."""


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of one text, without bos and eos."""
    return tokenizer.encode_batch([text.encode("utf-8")])[0]


def encode_documents(tokenizer: Tokenizer, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of documents one after the other [tokens], bos and eos around each, and their lengths [documents]."""
    before = [] if tokenizer.bos_id is None else [np.array([tokenizer.bos_id])]
    after = [] if tokenizer.eos_id is None else [np.array([tokenizer.eos_id])]
    pieces = [piece for ids in tokenizer.encode_batch(texts) for piece in (*before, ids, *after)]
    per_document = len(before) + 1 + len(after)
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    return tokens, sizes.reshape(-1, per_document).sum(axis=1)


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; bos and eos, where the config names them, come after."""

    def __init__(self, config: TokenizerConfig):
        names = [name for name in (config.bos, config.eos) if name]
        ids = {name: 256 + index for index, name in enumerate(dict.fromkeys(names))}
        self.vocab_size, self.special_tokens = 256 + len(ids), ids
        self.bos_id, self.eos_id = ids.get(config.bos), ids.get(config.eos)
        self.fingerprint = _hash("bytes", str(self.bos_id), str(self.eos_id))

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def encode_special(self, text: str) -> np.ndarray:
        return self.encode_spans(text, special=True)[0]

    def encode_spans(self, text: str, *, special: bool) -> tuple[np.ndarray, np.ndarray]:
        names = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))) or "(?!)"
        units = re.finditer(f"{names}|.", text, re.DOTALL) if special else re.finditer(".", text, re.DOTALL)
        ids, spans = [], []
        for unit in units:
            own = [self.special_tokens[unit[0]]] if unit[0] in self.special_tokens else list(unit[0].encode())
            ids += own
            spans += [unit.span()] * len(own)
        return np.array(ids, np.uint32), np.array(spans, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(token) for token in ids if token < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json, by the `tokenizers` library and its threads.

    Args:
      definition: the content of the tokenizer.json; its hash is the fingerprint, whatever the library's version.
      name: what errors call it.
      bos, eos: tokens of its vocabulary, "" for none.

    Raises:
      TokenizerError: `bos` or `eos` is not in the vocabulary.
    """

    def __init__(self, definition: str, name: str, *, bos: str, eos: str):
        self._definition, self._name, self._bos, self._eos = definition, name, bos, eos
        try:
            self._backend = backend = Backend.from_str(definition)
        except Exception as error:  # the library raises Exception itself
            raise TokenizerError(f"data.tokenizer.path: {name}: not a tokenizer.json: {error}") from None
        vocabulary = backend.get_vocab(with_added_tokens=True)
        # A vocabulary may have holes: the largest id counts, not the number of tokens.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        for field, token in (("bos", bos), ("eos", eos)):
            if token and token not in vocabulary:
                special = [entry.content for entry in backend.get_added_tokens_decoder().values()]
                raise TokenizerError(f"data.tokenizer.{field}: {name} has no token {token!r}{nearest(token, special)}")
        self.bos_id, self.eos_id = vocabulary.get(bos), vocabulary.get(eos)
        self.special_tokens = {
            entry.content: token for token, entry in backend.get_added_tokens_decoder().items() if entry.special
        }
        self.fingerprint = _hash(self._definition, str(self.bos_id), str(self.eos_id))
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True

    @classmethod
    def open(cls, path: Path, *, bos: str, eos: str) -> Self:
        """Reads a tokenizer.json.

        Raises:
          TokenizerError: the file is missing or no tokenizer.
        """
        try:
            definition = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise TokenizerError(f"data.tokenizer.path: {path}: {why}; a tokenizer.json is wanted") from None
        return cls(definition, str(path), bos=bos, eos=eos)

    def __reduce__(self):
        # The library's own pickling forgets encode_special_tokens.
        return functools.partial(type(self), bos=self._bos, eos=self._eos), (self._definition, self._name)

    def save(self, path: Path) -> None:
        """Writes the tokenizer.json."""
        path.write_text(self._definition, encoding="utf-8")

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast([text.decode("utf-8") for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_special(self, text: str) -> np.ndarray:
        return self.encode_spans(text, special=True)[0]

    def encode_spans(self, text: str, *, special: bool) -> tuple[np.ndarray, np.ndarray]:
        encoding = (self._special_backend if special else self._backend).encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.uint32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    @functools.cached_property
    def _special_backend(self) -> Backend:
        # A second one, because the setting is not of a call: another thread may be encoding documents.
        backend = Backend.from_str(self._definition)
        backend.no_padding()
        backend.no_truncation()
        return backend

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> FileTokenizer:
    """Byte-level BPE with `config.vocab_size` tokens (fewer where `texts` has no more pairs); digits stay single.

    The same texts in the same order give the same tokenizer. Source: Sennrich et al. 2016, byte-level as in GPT-2.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(dict.fromkeys(name for name in (config.bos, config.eos) if name)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return FileTokenizer(backend.to_str(), "the trained tokenizer", bos=config.bos, eos=config.eos)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, name: str) -> None:
    """Raises TokenizerError where `tokenizer` has ids that a vocabulary of `vocab_size` (the field `name`) has not."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{name}: the tokenizer has {tokenizer.vocab_size:,} tokens, more than {vocab_size:,}; "
            f"make {name} at least {tokenizer.vocab_size}"
        )


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
