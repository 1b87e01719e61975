"""Chats and pairs of chats laid into rows: whole in one row each, cut off where they are too long.

An example is one document (a chat) or two (the chosen and the rejected chat of a pair).

Layouts:
  BestFitExamples    best-fit-decreasing bin packing: several in a row, little padding.
  OneExamplePerRow   a row for each, the rest of it padding: a batch has exactly as many as rows.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from lightning_jax.input_pipeline.packing import (
    BestFitRows,
    Documents,
    PackedRows,
    PackingError,
    Pieces,
    SplitRows,
    best_fit_decreasing,
)


class _Examples:
    """Of the two layouts of examples: what of a document is in a row.

    Its last token is an input too, with no target, for that is where a reward model reads its score.

    Args:
      documents_per_example: 1 for chats, 2 for pairs.
    """

    def __init__(self, store: Documents, context_length: int, documents_per_example: int = 1):
        if (len(store.offsets) - 1) % documents_per_example:
            raise PackingError(f"{store.folder}: an odd number of chats; give this stage a corpus of preferences")
        if np.any(np.diff(store.offsets) < 2):
            raise PackingError(f"{store.folder}: a chat of fewer than two tokens; prepare the corpus again")
        self.documents_per_example = documents_per_example
        super().__init__(store, context_length)

    def _inputs(self, offsets: np.ndarray) -> np.ndarray:
        return np.minimum(np.diff(offsets), self.context_length // self.documents_per_example)


class BestFitExamples(_Examples, BestFitRows):
    """Examples packed by the length that all their documents have together, in windows as those of BestFitRows."""

    _targets_behind = 0

    def _layout(self) -> tuple[str | int, ...]:
        return "best_fit_examples", 1, self.documents_per_example

    def _windows(self) -> Iterator[dict[str, np.ndarray]]:
        num_pieces, per_example = 0, self.documents_per_example
        for first in range(0, len(self._offsets) - 1, self.window):
            offsets = self._offsets[first : first + self.window + 1]
            length_EP = self._inputs(offsets).reshape(-1, per_example)
            start_EP = offsets[:-1].reshape(-1, per_example)
            row_E = best_fit_decreasing(length_EP.sum(axis=1), self.context_length)
            order_E = np.argsort(row_E, kind="stable")
            row_end = num_pieces + np.cumsum(np.bincount(row_E)) * per_example
            yield {"start": start_EP[order_E].ravel(), "length": length_EP[order_E].ravel(), "row_end": row_end}
            num_pieces = int(row_end[-1])


class OneExamplePerRow(_Examples, PackedRows):
    """Row i is example i."""

    def __len__(self) -> int:
        return (len(self._offsets) - 1) // self.documents_per_example

    def pieces(self, rows: np.ndarray) -> Pieces:
        document = (rows[:, None] * self.documents_per_example + np.arange(self.documents_per_example)).ravel()
        start = self._offsets[document]
        share = self.context_length // self.documents_per_example
        length = np.minimum(self._offsets[document + 1] - start, share)
        return Pieces(np.full(len(rows), self.documents_per_example), start, length, start + length)


def pack(
    store: Documents,
    packing: Literal["split", "best_fit", "one_per_row"],
    context_length: int,
    documents_per_example: int = 1,
) -> PackedRows:
    """The rows of a store of text, or of examples where it says which tokens are trained.

    Raises:
      PackingError: the store holds nothing to predict, or cannot be packed so.
    """
    if store.trained is None:
        layouts = {"split": SplitRows, "best_fit": BestFitRows}
        if packing not in layouts or documents_per_example > 1:
            raise PackingError(f'{store.folder}: text, which has no pairs and is packed by "split" or "best_fit"')
        return layouts[packing](store, context_length)
    examples = {"best_fit": BestFitExamples, "one_per_row": OneExamplePerRow}
    if packing not in examples:
        raise PackingError(f'{store.folder}: "{packing}" would cut chats; pack them by "best_fit" or "one_per_row"')
    return examples[packing](store, context_length, documents_per_example)
