"""Prompts for reinforcement learning: chats up to the assistant's turn, with what a verifier needs to know of each.

Records are those of `chat_prompt`. Prompts are held in memory: a hundred thousand of them are a small corpus.
"""

import functools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_jax.input_pipeline.chat_masks import end_of_turn
from lightning_jax.input_pipeline.chat_records import chat_prompt
from lightning_jax.input_pipeline.chat_template import Message, encode_chats
from lightning_jax.input_pipeline.chat_templates import open_template, template_tokens
from lightning_jax.input_pipeline.config import CorpusConfig, DataConfig
from lightning_jax.input_pipeline.documents import is_held_out
from lightning_jax.input_pipeline.errors import SourceError
from lightning_jax.input_pipeline.generated_tasks import TASKS
from lightning_jax.input_pipeline.readers import Problem, read_json_records, read_parquet_records
from lightning_jax.input_pipeline.sources import RecordReport, files_of, fingerprint
from lightning_jax.input_pipeline.tokenizers import Tokenizer

# Of Parquet files, whose other columns may be large: what is asked, and what verifiers read.
_COLUMNS = (
    "prompt",
    "messages",
    "ground_truth",
    "reference",
    "dataset",
    "family",
    "pass_rate",
    "instruction_id_list",
    "kwargs",
    "test",
    "entry_point",
    "inputs",
    "outputs",
)


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    Attributes:
      ids: its tokens, up to where the assistant begins.
      chat: the same as messages.
      record: the other fields of its record.
    """

    ids: tuple[int, ...]
    chat: tuple[Message, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a corpus; those are held out whose conversations would be.

    Attributes:
      end_of_turn: the token with which the assistant ends its turn.
    """

    name: str
    end_of_turn: int
    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    report: RecordReport

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for prompts and records that are equal, in the same order."""
        parts = (self.train, self.validation)
        return fingerprint([[[prompt.ids, dict(prompt.record)] for prompt in part] for part in parts])

    def __str__(self) -> str:
        return f"{self.name}: {len(self.train):,} prompts, {len(self.validation):,} held out; {self.report}"


def read_prompts(
    name: str, config: DataConfig, tokenizer: Tokenizer, *, most_tokens: int, fields: Collection[str] = ()
) -> Prompts:
    """The prompts of the corpus that the config calls `name`; longer ones than `most_tokens` are left out and counted.

    Args:
      fields: of records, that are asked for besides those that verifiers read.

    Raises:
      SourceError: there is no prompt, or none that is short enough.
    """
    report = RecordReport()
    chats: list[list[Message]] = []
    records: list[dict[str, Any]] = []
    for location, record in _records(name, config, fields):
        asked = chat_prompt(record)
        if isinstance(asked, Problem):
            report.skip(location, asked)
        else:
            chats.append(asked[0])
            records.append(asked[1])
    encoded = encode_chats(
        tokenizer,
        open_template(config) or "",
        chats,
        special_tokens=template_tokens(config),
        add_generation_prompt=True,
    )
    train, validation = [], []
    for number, (ids, chat, record) in enumerate(zip(encoded, chats, records, strict=True), start=1):
        if len(ids) > most_tokens:
            report.skip(f"{name}:{number}", Problem("too long", f"{len(ids):,} tokens, at most {most_tokens:,}"))
            continue
        report.documents += 1
        identity = json.dumps(chat, sort_keys=True, ensure_ascii=False).encode()
        held_out = is_held_out(identity, config.validation_fraction)
        (validation if held_out else train).append(Prompt(tuple(ids.tolist()), tuple(chat), record))
    if not train:
        raise SourceError(f"data.corpora.{name}: no prompt to train on: {report}")
    if (end := end_of_turn(config, tokenizer)) is None:
        raise SourceError(
            f"data.corpora.{name}: data.chat_template ends the assistant's turn with no special token, so completions "
            "would never stop; let it write one behind the content"
        )
    return Prompts(name, end, tuple(train), tuple(validation), report)


def _records(name: str, config: DataConfig, fields: Collection[str]) -> Iterator[tuple[str, Any]]:
    corpus: CorpusConfig = config.corpora[name]
    if corpus.format == "generated":
        for number, record in enumerate(TASKS[corpus.path].records["conversations"](), start=1):
            yield f"{corpus.path}:{number}", record
        return
    try:
        paths: list[Path] = files_of(corpus)
    except SourceError as error:
        raise SourceError(f"data.corpora.{name}: {error}") from None
    for path in paths:
        if corpus.format == "jsonl":
            yield from read_json_records(path, config.max_document_bytes)
        else:
            yield from read_parquet_records(path, {*_COLUMNS, *fields})
