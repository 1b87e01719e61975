"""The documents of a corpus, and which of them are held out."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning_jax.input_pipeline.config import DataConfig
from lightning_jax.input_pipeline.errors import SourceError
from lightning_jax.input_pipeline.readers import Record
from lightning_jax.input_pipeline.sources import Document, RecordReport, read_documents


def documents(
    name: str, read: Callable[[Any], Iterator[Record]], part: Any, report: RecordReport, config: DataConfig
) -> Iterator[Document]:
    """The documents of a part of the corpus `name`, counting in `report` what is skipped; raises as `prepare` does."""
    try:
        yield from read_documents(
            read(part), report, on_bad_record=config.on_bad_record, max_document_bytes=config.max_document_bytes
        )
    except SourceError as error:
        raise SourceError(f"data.corpora.{name}: {error}") from None


def is_held_out(document: bytes, fraction: float) -> bool:
    """Whether `document` belongs to the held-out part: a uniform hash of its bytes is below `fraction`.

    Chats go by their prompt, so that no question that was trained on is held out with another answer.
    """
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest()) < fraction * 2**64
