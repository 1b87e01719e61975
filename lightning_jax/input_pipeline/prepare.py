"""From raw corpora to token stores, once: what is prepared stays in the cache until its sources or settings change.

A document is held out for validation if the hash of its bytes says so; then copies of it are held out too, and nothing
else in the corpus has a say. Parts of a source are tokenized one by one, by any number of processes, and put together
in their order, so the store is a function of the data and the config alone. A killed preparation goes on from the
parts that it had finished.
"""

import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_jax.input_pipeline.cache import cache_folder, lock
from lightning_jax.input_pipeline.config import DataConfig
from lightning_jax.input_pipeline.encoding import make_encoder
from lightning_jax.input_pipeline.errors import TokenizerError, TokenStoreError
from lightning_jax.input_pipeline.sources import RecordReport, fingerprint, open_source
from lightning_jax.input_pipeline.store_building import SPLITS, Progress, build_store
from lightning_jax.input_pipeline.token_store import FORMAT_VERSION, TokenStore
from lightning_jax.input_pipeline.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_VERIFIED_BYTES = 2**30  # a larger store is not read from end to end at every start


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus as tokens on disk."""

    name: str
    train: TokenStore
    validation: TokenStore  # empty where the corpus is too small for the fraction, or the fraction is 0
    description: str  # what it was made of
    report: RecordReport  # what was skipped of it

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.description}; {self.train.num_tokens:,} tokens to train on, "
            f"{self.validation.num_tokens:,} held out; {self.report}"
        )


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    processes: int = 1,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, PreparedCorpus]:
    """The token stores of every corpus, made now where the cache has none that fits.

    Args:
      config: what the data are.
      tokenizer: from `prepare_tokenizer`.
      processes: how many parts of a corpus are tokenized at once; has no influence on the result.
      progress: called after every few megabytes (with several processes, after every part).

    Raises:
      DataError: a corpus cannot be read as configured, in one line; BadRecordError for a bad record with
        on_bad_record="stop".
    """
    return {name: _prepare_corpus(name, config, tokenizer, processes, progress) for name in sorted(config.corpora)}


def _prepare_corpus(
    name: str, config: DataConfig, tokenizer: Tokenizer, processes: int, progress: Callable[[Progress], None]
) -> PreparedCorpus:
    corpus = config.corpora[name]
    if corpus.format == "tokens":
        return _open_prepared(name, Path(corpus.path).expanduser(), tokenizer)
    source = open_source(name, corpus, config.max_document_bytes)
    encoder = make_encoder(name, config, tokenizer)
    settings = [
        FORMAT_VERSION,
        [corpus.format, corpus.field, source.fingerprint],
        [tokenizer.fingerprint, tokenizer.vocab_size],
        [config.validation_fraction, config.on_bad_record, config.max_document_bytes],
    ]
    if corpus.content != "text":
        settings.append([corpus.content, encoder.description])
    key = fingerprint(settings)
    folder = cache_folder(config) / "corpora" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{key[:16]}"
    # What is whole needs no lock: a folder gets its name when it is finished. So a read-only cache serves many hosts.
    with contextlib.suppress(TokenStoreError):
        return _open_prepared(name, folder, tokenizer)
    with lock(folder):
        try:
            return _open_prepared(name, folder, tokenizer)
        except TokenStoreError as error:
            if folder.exists():
                logger.warning("%s; preparing it again", str(error).partition(";")[0])
        build_store(name, config, tokenizer, source, encoder, folder, processes, progress)
        return _open_prepared(name, folder, tokenizer)


def _open_prepared(name: str, folder: Path, tokenizer: Tokenizer) -> PreparedCorpus:
    """A folder with a train and a validation store, as `build_store` leaves it."""
    stores = [TokenStore.open(folder / split) for split in SPLITS]
    for store in stores:
        if store.manifest.tokenizer != tokenizer.fingerprint:
            raise TokenizerError(
                f"data.corpora.{name}: {store.folder} has another tokenizer ({store.manifest.tokenizer[:12]}) "
                f"than data.tokenizer ({tokenizer.fingerprint[:12]}); name the tokenizer.json it was made with"
            )
        if store.tokens.nbytes <= _VERIFIED_BYTES:
            store.verify()
    train, validation = stores
    made_of = train.manifest.source
    return PreparedCorpus(name, train, validation, made_of["description"], RecordReport.from_json(made_of["records"]))
