"""Prompts into states, in pieces of few sizes, so that what is compiled does not depend on the prompts.

Shapes: X rows, T tokens of the longest prompt, P tokens of a piece.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_jax.generation import decoding

if TYPE_CHECKING:
    from lightning_jax.generation.generator import Generator

PIECES = (1, 4, 16)  # pieces of a prompt are prefill_tokens over these


def prefill(generator: "Generator", prompts: Sequence[Sequence[int] | np.ndarray]) -> decoding.State:
    """The state behind prompts, a row of each, with room for the generator's capacity; an empty one leaves it empty."""
    graphdef, params, settings = generator.graphdef, generator.params, generator.settings
    state = decoding.initial_state(graphdef, params, len(prompts), settings.capacity)
    for tokens_XP, positions_XP in pieces(prompts, settings.prefill_tokens):
        state = decoding.prefill(graphdef, params, state, tokens_XP, positions_XP)
    return state


def pieces(prompts: Sequence[Sequence[int] | np.ndarray], most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and positions of prompts aligned at the right, in pieces of at most so many tokens."""
    sizes = [most // part for part in PIECES]
    total = -(-max(map(len, prompts)) // sizes[-1]) * sizes[-1]
    tokens_XT = np.zeros((len(prompts), total), np.int32)
    positions_XT = np.full((len(prompts), total), -1, np.int32)
    for row, ids in enumerate(prompts):
        if len(ids):
            tokens_XT[row, -len(ids) :] = ids
            positions_XT[row, -len(ids) :] = np.arange(len(ids))
    start = 0
    while start < total:
        size = next(size for size in sizes if size <= total - start)
        yield tokens_XT[:, start : start + size], positions_XT[:, start : start + size]
        start += size
