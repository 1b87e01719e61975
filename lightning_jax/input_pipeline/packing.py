"""Documents laid into rows of fixed length, each row computable from its number alone.

Layouts of text:
  SplitRows        concatenate all documents, then cut: no padding, documents cut wherever a row ends.
  BestFitRows      best-fit-decreasing bin packing: documents stay whole where they fit a row; a little padding.
                   Source: "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830) section 3.
In both, every (input, target) pair of neighbouring tokens of every document stands in exactly one row, exactly once.

Layouts of examples, which are one document (a chat) or two (the chosen and the rejected chat of a pair), never in more
than one row, and cut off where they are too long:
  BestFitExamples  bin packing as above.
  OneExamplePerRow a row for each, the rest of it padding.

Shapes: R rows, T tokens of a row (the context length), P pieces of documents in those rows.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from lightning_jax.input_pipeline.errors import DataError
from lightning_jax.input_pipeline.shuffle import fold_key

Batch = dict[str, np.ndarray]
"""Arrays [R, T]: `inputs`, `targets` int32; `segment_ids` int32, pieces of a row numbered 1, 2, ..., 0 for padding;
`positions` int32, from 0 in each piece; `loss_mask` bool, whether the target continues the input's document and is
trained. Targets outside the mask, and all padding, are 0. A value that documents have comes as float32 [R, T] too: that
of segment s in column s - 1, and 0 behind the last."""


class PackingError(DataError):
    """A store that cannot be packed; the message is one line."""


class Documents(Protocol):
    """What packing needs of a token store."""

    folder: Path
    tokens: np.ndarray  # integers [num_tokens]
    offsets: np.ndarray  # int64 [documents + 1]; document i is tokens[offsets[i]:offsets[i + 1]]
    trained: np.ndarray | None  # bool [num_tokens]; None where all are
    document_values: Mapping[str, np.ndarray]  # float32 [documents] each

    @property
    def fingerprint(self) -> str: ...  # of the content


class Pieces(NamedTuple):
    """Parts of documents that fill rows from the left, in order."""

    per_row: np.ndarray  # int64 [R], at least 1 each
    start: np.ndarray  # int64 [P], the piece's first token in the store
    length: np.ndarray  # int64 [P], its inputs
    document_end: np.ndarray  # int64 [P], the token in the store after the last one that may be a target


class PackedRows(ABC):
    """Rows of `context_length` tokens over one store, numbered from 0; safe to share between threads.

    Raises:
      PackingError: the store holds no document of two tokens or more.
    """

    def __init__(self, store: Documents, context_length: int):
        if not np.any(np.diff(store.offsets) > 1):
            raise PackingError(
                f"{store.folder}: no document has two tokens or more, so there is nothing to predict; "
                "give this corpus documents or leave it out of the mixture"
            )
        self._tokens = store.tokens
        self._offsets = store.offsets
        self._trained = store.trained
        self._document_values = store.document_values
        self.context_length = context_length

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows in one pass over the documents."""

    @abstractmethod
    def pieces(self, rows: np.ndarray) -> Pieces:
        """What the given rows, int64 [R], are made of."""

    def __getitem__(self, row: int) -> Batch:
        """One row: arrays [T]."""
        if not 0 <= row < len(self):
            raise IndexError(f"no row {row}; there are {len(self):,}")
        return {name: array[0] for name, array in self.take(np.array([row])).items()}

    def take(self, rows: np.ndarray) -> Batch:
        """The given rows, int64 [R], as a batch [R, T]."""
        pieces = self.pieces(np.asarray(rows, np.int64))
        first_piece_R = np.cumsum(pieces.per_row) - pieces.per_row
        before_P = np.cumsum(pieces.length) - pieces.length
        row_P = np.repeat(np.arange(len(rows)), pieces.per_row)
        slot_P = row_P * self.context_length + before_P - before_P[first_piece_R][row_P]

        # From here on one entry per input token.
        position = _counting(pieces.length)
        token = np.repeat(pieces.start, pieces.length) + position
        trained = token + 1 < np.repeat(pieces.document_end, pieces.length)
        target = token + trained
        if self._trained is not None:
            trained &= self._trained[target]
        segment_P = _counting(pieces.per_row)
        values = {
            "inputs": self._tokens[token],
            "targets": np.where(trained, self._tokens[target], 0),
            "segment_ids": np.repeat(segment_P + 1, pieces.length),
            "positions": position,
            "loss_mask": trained,
        }
        slot = np.repeat(slot_P, pieces.length) + position
        batch = {}
        for name, value in values.items():
            array = np.zeros(len(rows) * self.context_length, bool if name == "loss_mask" else np.int32)
            array[slot] = value
            batch[name] = array.reshape(len(rows), self.context_length)
        for name, value in self._document_values.items():
            batch[name] = np.zeros((len(rows), self.context_length), np.float32)
            batch[name][row_P, segment_P] = value[self._document_of(pieces.start)]
        return batch

    def documents(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, segment - 1, document) of every piece in the given rows, [P] each, all counted from 0."""
        pieces = self.pieces(rows)
        row_P = np.repeat(np.arange(len(rows)), pieces.per_row)
        return row_P, _counting(pieces.per_row), self._document_of(pieces.start)

    def _document_of(self, start_P: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._offsets, start_P, side="right") - 1


class SplitRows(PackedRows):
    """Concatenate, then cut: row i has the inputs tokens[i·T : (i+1)·T] and their targets, one token later.

    A document's last token is an input too, with no target. Only the last row may have padding.
    """

    def __len__(self) -> int:
        return -((1 - int(self._offsets[-1])) // self.context_length)

    def pieces(self, rows: np.ndarray) -> Pieces:
        row_start = rows * self.context_length
        row_end = np.minimum(row_start + self.context_length, self._offsets[-1])
        first = np.searchsorted(self._offsets, row_start, side="right") - 1
        per_row = np.searchsorted(self._offsets, row_end, side="left") - first
        row = np.repeat(np.arange(len(rows)), per_row)
        document = first[row] + _counting(per_row)
        document_end = self._offsets[document + 1]
        start = np.maximum(self._offsets[document], row_start[row])
        length = np.minimum(document_end, row_end[row]) - start
        kept = length > 0  # empty documents between others
        per_row = np.bincount(row[kept], minlength=len(rows))
        return Pieces(per_row, start[kept], length[kept], document_end[kept])


class BestFitRows(PackedRows):
    """Documents whole where they fit, by best-fit-decreasing bin packing; the packing is kept in the store's folder.

    A document of n tokens is n - 1 inputs: its last token is only a target. One with more than T inputs is cut into
    pieces of T, rows of their own, and a rest that is packed like a document. Documents are packed in windows of
    `window` documents, which bounds memory and the distance in the store between documents that share a row.
    """

    window = 2**18
    _targets_behind = 1  # a piece's last input has a target, the token behind it

    def __init__(self, store: Documents, context_length: int):
        super().__init__(store, context_length)
        name, *version = self._layout()
        key = fold_key(name, *version, store.fingerprint, context_length, self.window)
        folder = Path(store.folder) / f"{name}_{context_length}_{key:016x}"
        if not folder.exists():
            _write_index(folder, self._windows())
        self._start, self._length, self._row_end = (_map_index(folder, name) for name in _INDEX_FILES)

    def __len__(self) -> int:
        return len(self._row_end)

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is not padding."""
        return float(np.sum(self._length, dtype=np.int64)) / (len(self) * self.context_length)

    def pieces(self, rows: np.ndarray) -> Pieces:
        first = np.where(rows > 0, self._row_end[rows - 1], 0)
        per_row = self._row_end[rows] - first
        piece = np.repeat(first, per_row) + _counting(per_row)
        start, length = self._start[piece], self._length[piece].astype(np.int64)
        return Pieces(per_row, start, length, start + length + self._targets_behind)

    def _layout(self) -> tuple[str | int, ...]:
        """Of the index: its name, and what tells it from another one."""
        return "best_fit", 1

    def _windows(self) -> Iterator[dict[str, np.ndarray]]:
        return _pack_windows(self._offsets, self.context_length, self.window)


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


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Bin packing: each item, longest first, goes into the fullest row that still has room for it.

    Equal lengths are placed together, so the cost grows with the number of distinct (length, free space) pairs met
    rather than with the number of items.

    Args:
      lengths: int [n], each from 1 to capacity.
      capacity: tokens of a row.

    Returns:
      int64 [n], each item's row; rows are numbered 0, 1, ... without gaps.
    """
    row_of_item = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    group_starts = np.flatnonzero(np.diff(lengths[order], prepend=0))
    rows_with_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    some_row_has_free = 0  # a set of free spaces as the bits of one integer
    num_rows = 0
    for items in np.split(order, group_starts[1:]):
        while len(items):
            length = int(lengths[items[0]])
            fitting = some_row_has_free >> length
            free = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            per_row = free // length
            needed = -(len(items) // -per_row)
            available = rows_with_free[free]
            if not fitting:
                available.extend(range(num_rows, num_rows + needed))
                num_rows += needed
            rows = available[-needed:]
            del available[-len(rows) :]
            placed, items = np.split(items, [len(rows) * per_row])
            row_of_item[placed] = np.repeat(rows, per_row)[: len(placed)]
            in_last_row = len(placed) - (len(rows) - 1) * per_row
            rows_with_free[free - per_row * length].extend(rows[:-1])
            rows_with_free[free - in_last_row * length].append(rows[-1])
            for space in (free, free - per_row * length, free - in_last_row * length):
                present = bool(rows_with_free[space]) << space
                some_row_has_free = some_row_has_free & ~(1 << space) | present
    return row_of_item


_INDEX_FILES: dict[str, np.dtype] = {"start": np.dtype("<i8"), "length": np.dtype("<i4"), "row_end": np.dtype("<i8")}


def _pack_windows(offsets: np.ndarray, context_length: int, window: int) -> Iterator[dict[str, np.ndarray]]:
    """Per window: its pieces' `start` and `length` [P], row after row, and `row_end` [R], the number of the piece that
    follows each row."""
    num_pieces = 0
    for first in range(0, len(offsets) - 1, window):
        document_start = offsets[first : first + window + 1]
        inputs = np.maximum(np.diff(document_start) - 1, 0)
        whole_rows, rest = np.divmod(inputs, context_length)
        packed = np.flatnonzero(rest)
        row_of_rest = best_fit_decreasing(rest[packed], context_length)
        by_row = np.argsort(row_of_rest, kind="stable")
        packed = packed[by_row]
        cut = np.repeat(np.arange(len(inputs)), whole_rows)
        start = np.concatenate(
            [
                document_start[cut] + _counting(whole_rows) * context_length,
                document_start[packed] + whole_rows[packed] * context_length,
            ]
        )
        length = np.concatenate([np.full(len(cut), context_length), rest[packed]])
        row_end = np.cumsum(np.concatenate([np.ones(len(cut), np.int64), np.bincount(row_of_rest)]))
        yield {"start": start, "length": length, "row_end": num_pieces + row_end}
        num_pieces += len(start)


def _write_index(folder: Path, windows: Iterator[dict[str, np.ndarray]]) -> None:
    """Writes the packing beside `folder`, then gives it its name: a killed writer leaves nothing behind."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
    except OSError as error:
        raise PackingError(
            f"{folder.parent}: cannot keep its best-fit packing here: {error.strerror}; "
            "copy the store to where you may write, or use packing='split'"
        ) from None
    files = {name: (partial / name).open("wb") for name in _INDEX_FILES}
    for window in windows:
        for name, dtype in _INDEX_FILES.items():
            files[name].write(np.ascontiguousarray(window[name], dtype).data)
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
        file.close()
    try:
        partial.rename(folder)
    except OSError:
        # Another process of the same run finished the same packing first.
        if not folder.exists():
            raise
        shutil.rmtree(partial)


def _map_index(folder: Path, name: str) -> np.ndarray:
    return np.memmap(folder / name, _INDEX_FILES[name], mode="r").view(np.ndarray)


def _counting(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., count - 1 for each count, one after the other."""
    return np.arange(np.sum(counts)) - np.repeat(np.cumsum(counts) - counts, counts)
