"""What is known of a corpus before any training: the loss of the best model that ignores context."""

import numpy as np

from lightning_jax.input_pipeline.token_store import TokenStore

_MOST_TOKENS = 50_000_000  # of each part; more would not change the figure


def unigram_cross_entropy(train: TokenStore, validation: TokenStore, vocab_size: int) -> float:
    """Nats per token of `validation` under the token frequencies of `train`, with one added to each count."""
    counts_V = np.bincount(train.tokens[:_MOST_TOKENS], minlength=vocab_size) + 1.0
    log_frequencies_V = np.log(counts_V / counts_V.sum())
    return float(-log_frequencies_V[validation.tokens[:_MOST_TOKENS]].mean())
