"""Tokenizes a corpus part by part, by any number of processes, into a train and a validation store."""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_jax.input_pipeline.config import DataConfig
from lightning_jax.input_pipeline.documents import documents, is_held_out
from lightning_jax.input_pipeline.encoding import ChatsEncoder, Example, TextEncoder
from lightning_jax.input_pipeline.errors import SourceError
from lightning_jax.input_pipeline.readers import Problem, Record
from lightning_jax.input_pipeline.sources import Document, RecordReport, Source, refuse
from lightning_jax.input_pipeline.token_store import TokenStore, TokenStoreWriter
from lightning_jax.input_pipeline.tokenizers import Tokenizer

SPLITS = ("train", "validation")
_REPORT = "report.json"
_BATCH_BYTES = 4 * 2**20  # of text, tokenized at a time


@dataclass(frozen=True)
class Progress:
    """How far the preparation of a corpus is."""

    corpus: str
    documents: int
    tokens: int
    parts_done: int
    parts: int


def build_store(
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
        train, validation = (stack.enter_context(_writer(folder / split, tokenizer, encoder)) for split in SPLITS)
        for batch in _batches(documents(name, read, part, report, config)):
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
    for split in SPLITS:
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
