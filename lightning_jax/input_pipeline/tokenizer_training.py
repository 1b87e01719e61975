"""The tokenizer that a config asks for, trained on the corpora where it says so, once."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path

from lightning_jax.input_pipeline.cache import cache_folder, lock
from lightning_jax.input_pipeline.config import DataConfig
from lightning_jax.input_pipeline.documents import documents, is_held_out
from lightning_jax.input_pipeline.errors import TokenizerError
from lightning_jax.input_pipeline.sources import RecordReport, Source, fingerprint, open_source
from lightning_jax.input_pipeline.token_store import FORMAT_VERSION
from lightning_jax.input_pipeline.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    check_vocabulary,
    train_tokenizer,
)

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 24 * 2**20  # of text, to train a tokenizer on
_SAMPLE_PARTS = 16


def prepare_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that the config asks for, trained on the corpora (not on what is held out) where it says so.

    Raises:
      DataError: the tokenizer or a corpus is not as the config says, in one line.
    """
    settings = config.tokenizer
    if settings.kind == "bytes":
        tokenizer: Tokenizer = ByteTokenizer(settings)
    elif settings.kind == "file":
        tokenizer = FileTokenizer.open(Path(settings.path).expanduser(), bos=settings.bos, eos=settings.eos)
    else:
        tokenizer = _trained(config)
    check_vocabulary(tokenizer, settings.vocab_size, "data.tokenizer.vocab_size")
    return tokenizer


def _trained(config: DataConfig) -> FileTokenizer:
    settings = config.tokenizer
    sources = {
        name: open_source(name, corpus, config.max_document_bytes)
        for name, corpus in sorted(config.corpora.items())
        if config.trains_the_tokenizer(name)
    }
    key = fingerprint(
        [
            [name, source.fingerprint, config.corpora[name].field, config.max_document_bytes]
            for name, source in sources.items()
        ]
        + [settings.vocab_size, settings.bos, settings.eos, config.validation_fraction, _SAMPLE_BYTES, FORMAT_VERSION]
    )
    path = cache_folder(config) / "tokenizers" / f"{key[:16]}.json"
    open_cached = functools.partial(FileTokenizer.open, path, bos=settings.bos, eos=settings.eos)
    # Missing or damaged: the same corpora give the same tokenizer again.
    with contextlib.suppress(TokenizerError):
        return open_cached()
    with lock(path):
        with contextlib.suppress(TokenizerError):
            return open_cached()
        logger.info("training a tokenizer of %d tokens on %s", settings.vocab_size, ", ".join(sources))
        texts = (text for name, source in sources.items() for text in _sample(name, source, config, len(sources)))
        tokenizer = train_tokenizer(texts, settings)
        partial = path.with_suffix(".partial")
        tokenizer.save(partial)
        partial.replace(path)
    return tokenizer


def _sample(name: str, source: Source, config: DataConfig, num_sources: int) -> Iterator[str]:
    """An equal share of the sample from each source, from parts all over it."""
    parts = source.parts[:: math.ceil(len(source.parts) / _SAMPLE_PARTS)]
    for part in parts:
        room = _SAMPLE_BYTES // (num_sources * len(parts))
        for _, document in documents(name, source.read, part, RecordReport(), config):
            if not is_held_out(document, config.validation_fraction):
                yield document.decode("utf-8")
                room -= len(document)
                if room <= 0:
                    break
