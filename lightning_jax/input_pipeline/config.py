"""What the data are: corpora, tokenizer, how they mix and how documents are packed into rows."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus: where its documents are and how to read them."""

    format: Literal["embedded", "text", "jsonl", "parquet", "array_record", "tfds", "huggingface", "tokens"]
    path: str  # file, folder or glob; tfds "name/config:version"; the part's name for "embedded"
    split: str  # tfds and huggingface; "" elsewhere
    field: str  # which field of a record holds the text; "" where a record is the text


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["bytes", "file", "train"]
    path: str  # kind="file": a tokenizer.json; "" else
    vocab_size: int  # kind="train": the size to train to; else what the tokenizer must not exceed
    bos: str  # token put before each document, "" for none
    eos: str  # token put after each document


@dataclass(frozen=True)
class DataConfig:
    """Everything about the data that does not change between stages."""

    corpora: dict[str, CorpusConfig]
    tokenizer: TokenizerConfig
    cache_dir: str  # token stores and trained tokenizers; "" means lightning_jax under the user's cache folder
    validation_fraction: float  # share of each corpus' documents, chosen by content hash, never trained on
    on_bad_record: Literal["skip", "stop"]
    max_document_bytes: int  # longer records count as bad


@dataclass(frozen=True)
class MixtureConfig:
    """Shares of tokens per corpus, moving linearly from `start` to `end` over the stage."""

    start: dict[str, float]
    end: dict[str, float]  # equal to start where the mixture does not move
    packing: Literal["split", "best_fit"]  # split: concatenate then cut; best_fit: documents stay whole where they fit
