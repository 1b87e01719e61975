"""Perplexity of a model on texts: by corpus, and by how much context the model has seen before a token.

Every text begins with the tokenizer's bos (its eos where it has no bos), which is not scored; without either, a text's
first token is not scored. In layout "documents" nothing but text is scored, so bits per byte compare models of any
tokenizers; in layout "windows" all texts stand in one sequence, eos behind each, whose bos and eos are scored too.

Source: Shortformer (arXiv 2012.15832) section 2 for windows that overlap.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_jax.errors import UserError
from lightning_jax.evaluation.scoring import Scorer, start_ids, windows
from lightning_jax.input_pipeline.readers import Problem, read_jsonl, read_text

Layout = Literal["documents", "windows"]

MAX_DOCUMENT_BYTES = 2**30
_PROBLEMS_SHOWN = 5
_JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def read_texts(path: Path, field: str | None) -> list[str]:
    """The texts of a file: of JSON lines, each line's `field` ("text" where None); any other file is one text.

    Raises:
        UserError: a line for each record that is none, up to a few.
    """
    if field is None and path.name.endswith(_JSONL_ENDINGS):
        field = "text"
    read: Callable = read_text if field is None else read_jsonl
    try:
        records = list(read(path, field or "", MAX_DOCUMENT_BYTES))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    problems = [
        f"{location}: {text}" for location, text in records if isinstance(text, Problem) and text.reason != "empty"
    ]
    if len(problems) > _PROBLEMS_SHOWN:
        problems[_PROBLEMS_SHOWN:] = [f"{path}: {len(problems) - _PROBLEMS_SHOWN:,} more records like these"]
    texts = [text for _, text in records if isinstance(text, str) and text]
    if problems or not texts:
        raise UserError("\n".join(problems or [f"{path}: it holds no text"]))
    return texts


def perplexity(
    scorer: Scorer, texts: Sequence[str], *, context_length: int, stride: int, layout: Layout
) -> dict[str, Any]:
    """How well a model predicts texts.

    Args:
        context_length: tokens that the model sees at most; longer texts are cut into overlapping windows.
        stride: tokens by which each window goes on, at most context_length; the smaller, the more context is left.

    Returns:
        `nats_per_token`, `perplexity` and `bits_per_byte`, with what they were counted over, and the first two
        `by_position`: over tokens before which the model has seen `from` to `to` tokens, powers of two.

    Raises:
        UserError: there is nothing to predict.
    """
    tokenizer = scorer.tokenizer
    encoded = [text.encode("utf-8") for text in texts]
    documents = [
        np.concatenate([start_ids(tokenizer), ids]).astype(np.int32) for ids in tokenizer.encode_batch(encoded)
    ]
    if layout == "windows":
        end = np.array([tokenizer.eos_id] if tokenizer.bos_id is not None and tokenizer.eos_id is not None else [])
        documents = [np.concatenate([part for ids in documents for part in (ids, end)]).astype(np.int32)]
    spans = [span for ids in documents for span in windows(ids, context_length, stride)]
    if not spans:
        raise UserError("perplexity: no text has two tokens or more, so there is nothing to predict")
    scores = scorer.score(spans)

    seen = np.concatenate([np.arange(span.first, len(span.ids)) for span in spans])
    nats = -np.concatenate([score.log_probs for score in scores]).astype(np.float64)
    bucket = np.frexp(seen)[1] - 1  # floor(log2), exact
    tokens_of, nats_of = np.bincount(bucket), np.bincount(bucket, nats)
    total_bytes = sum(map(len, encoded))
    return {
        "documents": len(texts),
        "bytes": total_bytes,
        "bits_per_byte": float(nats.sum() / math.log(2) / total_bytes),
        **_rates(len(nats), nats.sum()),
        "by_position": [
            {"from": 2**power, "to": 2 ** (power + 1) - 1, **_rates(tokens, nats_of[power])}
            for power, tokens in enumerate(tokens_of)
            if tokens
        ],
    }


def _rates(tokens: int, nats: float) -> dict[str, float]:
    per_token = float(nats / tokens)
    return {"tokens": int(tokens), "nats_per_token": per_token, "perplexity": math.exp(min(per_token, 700.0))}
