"""What the data are: corpora, tokenizer, how they mix and how documents are packed into rows."""

import math
from dataclasses import dataclass
from typing import Literal

EMBEDDED_PARTS = ("text", "code")
GENERATED_TASKS = {
    "arithmetic": ("conversations", "preferences"),
    "legs": ("conversations",),
}  # and their contents


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus: where its documents are and how to read them."""

    format: Literal[
        "embedded", "generated", "text", "jsonl", "parquet", "array_record", "tfds", "huggingface", "tokens"
    ]
    path: str  # file, folder or glob; tfds "name/config:version" or folder; the part's or task's name where we bring it
    split: str  # tfds and huggingface; "" elsewhere
    field: str  # which field of a record holds the text; "" where a record is the text, or chats
    content: Literal["text", "conversations", "preferences"]  # chats are rendered by data.chat_template
    turns: Literal["all", "last"]  # which of the assistant's turns in a chat are trained; "all" for text

    def problems(self) -> list[str]:
        found = self._problems_of_chats()
        if not self.path:
            found.append("path: empty; give a file, folder or glob, or the name of a data set")
        elif self.format == "embedded" and self.path not in EMBEDDED_PARTS:
            found.append(f"path: the embedded corpus has no part {self.path!r}; {' or '.join(EMBEDDED_PARTS)}")
        if self.format in ("parquet", "tfds", "huggingface") and not self.field and self.content == "text":
            found.append(f'field: empty; name the column of {self.format} records that holds the text, often "text"')
        if self.format in ("embedded", "text", "tokens") and self.field:
            found.append(f'field: {self.format} records have no field {self.field!r}; make it ""')
        if self.format == "tfds" and not self.split:
            found.append('split: empty; name one, often "train"')
        if self.format not in ("tfds", "huggingface") and self.split:
            found.append(f'split: {self.format} has no split {self.split!r}; make it ""')
        return found

    def _problems_of_chats(self) -> list[str]:
        found = []
        if self.content == "text":
            if self.turns != "all":
                found.append('turns: text has none; make it "all"')
            if self.format == "generated":
                found.append('content: generated tasks are chats; make it "conversations" or "preferences"')
            return found
        if self.format not in ("jsonl", "parquet", "generated", "tokens"):
            found.append(f"format: chats are read from jsonl or parquet, not from {self.format}")
        if self.field and self.format in ("jsonl", "parquet", "generated"):
            found.append(f'field: the fields of chats have fixed names, not {self.field!r}; make it ""')
        if self.format == "generated" and self.path not in GENERATED_TASKS:
            found.append(f"path: no task {self.path!r} is generated; {' or '.join(GENERATED_TASKS)}")
        elif self.format == "generated" and self.content not in GENERATED_TASKS[self.path]:
            found.append(f"content: {self.path} has no {self.content}; make it {GENERATED_TASKS[self.path][0]!r}")
        return found


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["bytes", "file", "train"]
    path: str  # kind="file": a tokenizer.json; "" else
    vocab_size: int  # kind="train": the size to train to; else what the tokenizer must not exceed
    bos: str  # token put before each document, "" for none
    eos: str  # token put after each document, "" for none

    def problems(self) -> list[str]:
        found = []
        if self.kind == "file" and not self.path:
            found.append("path: empty; give a tokenizer.json")
        if self.kind != "file" and self.path:
            found.append(f'path: kind="{self.kind}" reads no file; make it "" or the kind "file"')
        least = {"bytes": "every byte", "train": "every byte", "file": "a token"}[self.kind]
        smallest = 1 if self.kind == "file" else 256 + len({self.bos, self.eos} - {""})
        if self.vocab_size < smallest:
            found.append(f"vocab_size: {self.vocab_size} has no room for {least}; make it at least {smallest}")
        return found


@dataclass(frozen=True)
class DataConfig:
    """Everything about the data that does not change between stages."""

    corpora: dict[str, CorpusConfig]
    tokenizer: TokenizerConfig
    cache_dir: str  # token stores and trained tokenizers; "" means lightning_jax under the user's cache folder
    validation_fraction: float  # share of each corpus' documents, chosen by content hash, never trained on
    on_bad_record: Literal["skip", "stop"]
    max_document_bytes: int  # longer records count as bad
    chat_template: str  # chatml, tulu, minimax_m1, llama3 or a file of Jinja; "" for the one beside tokenizer.json

    def problems(self) -> list[str]:
        found = []
        if not self.corpora:
            found.append("corpora: empty; name at least one corpus")
        if not 0 <= self.validation_fraction < 1:
            found.append(f"validation_fraction: {self.validation_fraction} is not in [0, 1)")
        if self.max_document_bytes < 1:
            found.append(f"max_document_bytes: {self.max_document_bytes} is not positive")
        if self.tokenizer.kind == "train" and not any(map(self.trains_the_tokenizer, self.corpora)):
            found.append('tokenizer.kind: no corpus holds text to train on; "file" with a tokenizer.json')
        if self.tokenizer.kind != "file" and not self.chat_template:
            found += [
                f'chat_template: "" is the tokenizer\'s own, and kind="{self.tokenizer.kind}" has none for '
                f"corpora.{name}; name one"
                for name, corpus in self.corpora.items()
                if corpus.content != "text" and corpus.format != "tokens"
            ]
        return found

    def trains_the_tokenizer(self, name: str) -> bool:
        """Whether a corpus has a say where the tokenizer is trained."""
        return self.corpora[name].format != "tokens" and self.corpora[name].content == "text"


@dataclass(frozen=True)
class MixtureConfig:
    """Shares of tokens per corpus, moving linearly from `start` to `end` over the stage."""

    start: dict[str, float]
    end: dict[str, float]  # equal to start where the mixture does not move
    # split: text concatenated, then cut. best_fit: documents whole where they fit; of chats what is longer than a row,
    # or in a pair than half a row, is cut off. one_per_row: a chat or a pair in each row, the rest is padding. In
    # reinforcement learning it is of completions with their prompts, of those of each update.
    packing: Literal["split", "best_fit", "one_per_row"]

    def problems(self) -> list[str]:
        found = []
        for field in ("start", "end"):
            shares = getattr(self, field)
            wrong = {name: share for name, share in shares.items() if not 0 <= share < math.inf}
            found.extend(f"{field}.{name}: {share} is no share; 0 leaves a corpus out" for name, share in wrong.items())
            if not wrong and not any(shares.values()):
                found.append(f"{field}: no corpus has a share; make one positive")
        if self.start.keys() != self.end.keys():
            odd = ", ".join(sorted(self.start.keys() ^ self.end.keys()))
            found.append(f"end: does not name the same corpora as start ({odd}); a share may be 0")
        return found
