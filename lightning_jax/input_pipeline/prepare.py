"""From raw corpora to token stores, once: what is prepared stays in the cache until its sources or settings change.

A document is held out for validation if the hash of its bytes says so; then copies of it are held out too, and nothing
else in the corpus has a say. Parts of a source are tokenized one by one, by any number of processes, and put together
in their order, so the store is a function of the data and the config alone. A killed preparation goes on from the
parts that it had finished.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.input_pipeline.config import DataConfig
from lightning_jax.input_pipeline.encoding import ChatsEncoder, Example, TextEncoder, make_encoder
from lightning_jax.input_pipeline.errors import DataError, SourceError, TokenizerError, TokenStoreError
from lightning_jax.input_pipeline.readers import Problem, Record
from lightning_jax.input_pipeline.sources import (
    Document,
    RecordReport,
    Source,
    fingerprint,
    open_source,
    read_documents,
    refuse,
)
from lightning_jax.input_pipeline.token_store import FORMAT_VERSION, TokenStore, TokenStoreWriter
from lightning_jax.input_pipeline.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    check_vocabulary,
    train_tokenizer,
)

logger = logging.getLogger(__name__)

_SPLITS = ("train", "validation")
_REPORT = "report.json"
_BATCH_BYTES = 4 * 2**20  # of text, tokenized at a time
_SAMPLE_BYTES = 24 * 2**20  # of text, to train a tokenizer on
_SAMPLE_PARTS = 16
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


@dataclass(frozen=True)
class Progress:
    """How far the preparation of a corpus is."""

    corpus: str
    documents: int
    tokens: int
    parts_done: int
    parts: int


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
        tokenizer = _trained_tokenizer(config)
    check_vocabulary(tokenizer, settings.vocab_size, "data.tokenizer.vocab_size")
    return tokenizer


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


def cache_folder(config: DataConfig) -> Path:
    """Where token stores and trained tokenizers are kept."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_jax"


def is_held_out(document: bytes, fraction: float) -> bool:
    """Whether `document` belongs to the held-out part: a uniform hash of its bytes is below `fraction`.

    Chats go by their prompt, so that no question that was trained on is held out with another answer.
    """
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest()) < fraction * 2**64


def _trained_tokenizer(config: DataConfig) -> FileTokenizer:
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
    with _lock(path):
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
        for _, document in _documents(name, source.read, part, RecordReport(), config):
            if not is_held_out(document, config.validation_fraction):
                yield document.decode("utf-8")
                room -= len(document)
                if room <= 0:
                    break


def _documents(
    name: str, read: Callable[[Any], Iterator[Record]], part: Any, report: RecordReport, config: DataConfig
) -> Iterator[Document]:
    try:
        yield from read_documents(
            read(part), report, on_bad_record=config.on_bad_record, max_document_bytes=config.max_document_bytes
        )
    except SourceError as error:
        raise SourceError(f"data.corpora.{name}: {error}") from None


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
    with _lock(folder):
        try:
            return _open_prepared(name, folder, tokenizer)
        except TokenStoreError as error:
            if folder.exists():
                logger.warning("%s; preparing it again", str(error).partition(";")[0])
        _build(name, config, tokenizer, source, encoder, folder, processes, progress)
        return _open_prepared(name, folder, tokenizer)


def _open_prepared(name: str, folder: Path, tokenizer: Tokenizer) -> PreparedCorpus:
    """A folder with a train and a validation store, as `_build` leaves it."""
    stores = [TokenStore.open(folder / split) for split in _SPLITS]
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


def _build(
    name: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    source: Source,
    encoder: TextEncoder | ChatsEncoder,
    folder: Path,
    processes: int,
    progress: Callable[[Progress], None],
) -> None:
    """Tokenizes every part of the source into stores of its own, then puts these together in order."""
    work = folder.with_name(f"{folder.name}.parts")
    parts = {work / f"{index:06d}": part for index, part in enumerate(source.parts)}
    missing = [part_folder for part_folder in parts if not (part_folder / _REPORT).exists()]
    meter = _Meter(name, len(parts) - len(missing), len(parts), progress)
    build = functools.partial(_build_part, name, config, tokenizer, encoder, source.read)
    if processes > 1 and len(missing) > 1:
        spawning = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(missing)), spawning, _tokenize_in_one_thread) as pool:
            for documents, tokens in pool.map(build, missing, [parts[part_folder] for part_folder in missing]):
                meter.add(documents, tokens)
                meter.finish_part()
    else:
        for part_folder in missing:
            build(part_folder, parts[part_folder], meter.add)
            meter.finish_part()
    _put_together(name, list(parts), tokenizer, encoder, source, folder)
    shutil.rmtree(work)


def _build_part(
    name: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    encoder: TextEncoder | ChatsEncoder,
    read: Callable[[Any], Iterator[Record]],
    folder: Path,
    part: Any,
    on_batch: Callable[[int, int], None] = lambda documents, tokens: None,
) -> tuple[int, int]:
    """Tokenizes one part into a train and a validation store; its report, written last, says that both are whole."""
    shutil.rmtree(folder, ignore_errors=True)
    report = RecordReport()
    with contextlib.ExitStack() as stack:
        train, validation = (stack.enter_context(_writer(folder / split, tokenizer, encoder)) for split in _SPLITS)
        for batch in _batches(_documents(name, read, part, report, config)):
            examples = []
            for document, example in zip(batch, encoder.encode([data for _, data in batch]), strict=True):
                if isinstance(example, Problem):
                    report.documents -= 1
                    refuse(document.location, example, report, config.on_bad_record)
                else:
                    examples.append(example)
            held_out = [is_held_out(example.identity, config.validation_fraction) for example in examples]
            for writer, wanted in ((train, False), (validation, True)):
                _append(writer, [example for example, held in zip(examples, held_out, strict=True) if held == wanted])
            on_batch(len(batch), sum(len(example.tokens) for example in examples))
    partial = folder / "report.partial"
    partial.write_text(json.dumps(report.to_json()), encoding="utf-8")
    partial.rename(folder / _REPORT)
    return report.documents, train.num_tokens + validation.num_tokens


def _append(writer: TokenStoreWriter, examples: list[Example]) -> None:
    if examples:
        fields = zip(*(example[:4] for example in examples), strict=True)
        writer.append_documents(*(None if values[0] is None else np.concatenate(values) for values in fields))


def _put_together(
    name: str,
    parts: list[Path],
    tokenizer: Tokenizer,
    encoder: TextEncoder | ChatsEncoder,
    source: Source,
    folder: Path,
) -> None:
    report = RecordReport()
    for part in parts:
        report.add(RecordReport.from_json(json.loads((part / _REPORT).read_text(encoding="utf-8"))))
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in _SPLITS:
        with _writer(partial / split, tokenizer, encoder) as writer:
            writer.source = {
                "fingerprint": source.fingerprint,
                "description": source.describe(),
                "records": report.to_json(),
            }
            for part in parts:
                writer.append_store(TokenStore.open(part / split))
        if split == "train" and not writer.num_tokens:
            why = "data.validation_fraction holds out all there are" if report.documents else str(report)
            raise SourceError(f"data.corpora.{name}: no document to train on: {why}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _writer(folder: Path, tokenizer: Tokenizer, encoder: TextEncoder | ChatsEncoder) -> TokenStoreWriter:
    return TokenStoreWriter(
        folder, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.fingerprint, more=encoder.files
    )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about `_BATCH_BYTES`."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Meter:
    """Adds up what is done and tells it."""

    def __init__(self, corpus: str, parts_done: int, parts: int, tell: Callable[[Progress], None]):
        self._corpus, self._parts_done, self._parts, self._tell = corpus, parts_done, parts, tell
        self._documents = self._tokens = 0

    def add(self, documents: int, tokens: int) -> None:
        self._documents += documents
        self._tokens += tokens
        self._tell(Progress(self._corpus, self._documents, self._tokens, self._parts_done, self._parts))

    def finish_part(self) -> None:
        self._parts_done += 1
        self.add(0, 0)


def _tokenize_in_one_thread() -> None:
    """Where every core has a process of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process at a time work on `path`; the kernel frees the lock of a process that dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(f"data.cache_dir: {path.parent}: {error.strerror}; name a folder to write to") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is preparing it; waiting", path.name)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
