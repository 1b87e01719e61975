"""Global batches by step: this host's part of each is a pure function of (seed, step), whatever the number of hosts.

Rows of the stage are numbered once, over all steps. The mixture says which corpus stands at each number; each corpus
is read pass by pass, every pass in a shuffled order of its own; the batch of a step is a range of numbers.

Shapes: B rows of this host, T tokens of a row.
"""

import types
from collections.abc import Mapping
from typing import Protocol

import grain
import numpy as np

from lightning_jax.input_pipeline.config import MixtureConfig
from lightning_jax.input_pipeline.errors import DataError
from lightning_jax.input_pipeline.mixture import Mixture
from lightning_jax.input_pipeline.packing import Batch, Documents, pack
from lightning_jax.input_pipeline.shuffle import fold_key, shuffled

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class BatchError(DataError):
    """A batch that cannot be made; the message is one line."""


class RowsPerStep(Protocol):
    """How the rows of a stage are divided into steps."""

    num_steps: int

    def rows(self, step: int) -> int: ...  # rows of the global batch at `step`

    def first_row(self, step: int) -> int: ...  # rows before `step`, for 0 <= step <= num_steps


class GlobalBatches:
    """The batches of one stage: `batches[step]` is a dict of arrays [B, T], the rows of this host.

    Process p of n holds the p-th of n equal parts of the global batch: the parts of all processes, one after the
    other, are the same global batch for any n. Safe to share between threads; nothing is remembered between steps.

    Args:
      stores: the corpora by name; only those with a share in the mixture are looked up.
      mixture: shares of the corpora and how documents are packed.
      batch_sizes: rows of each step.
      context_length: T.
      seed: decides the order of corpora and of the rows of each.
      documents_per_example: 2 for preferences, else 1.
      rows_before: rows of each corpus that were read already, by an earlier stage of the same context length and
        packing: this one reads on from there. From `row_counts` of that stage.
      process_index, process_count: which host this is, of how many.

    Raises:
      BatchError: there are no steps, or a batch cannot be divided among the hosts.
      MixtureError, PackingError: the mixture or a store is at fault.
    """

    def __init__(
        self,
        stores: Mapping[str, Documents],
        mixture: MixtureConfig,
        batch_sizes: RowsPerStep,
        context_length: int,
        *,
        seed: int,
        documents_per_example: int = 1,
        rows_before: Mapping[str, int] = types.MappingProxyType({}),
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not batch_sizes.num_steps:
            raise BatchError("batch_size: the stage has no steps; give it more tokens")
        for rows in sorted({batch_sizes.rows(step) for step in range(batch_sizes.num_steps)}):
            _host_slice(rows, process_index, process_count)
        self._mixture = Mixture(mixture, stores.keys(), batch_sizes.first_row(batch_sizes.num_steps), seed)
        self._corpora = [
            pack(stores[name], mixture.packing, context_length, documents_per_example) for name in self._mixture.names
        ]
        self._rows_before = [rows_before.get(name, 0) for name in self._mixture.names]
        self._keys = [fold_key("rows", seed, name) for name in self._mixture.names]
        self._batch_sizes = batch_sizes
        self._context_length = context_length
        self._process = (process_index, process_count)

    def __len__(self) -> int:
        """Steps of the stage."""
        return self._batch_sizes.num_steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not in this stage of {len(self)} steps")
        part = _host_slice(self._batch_sizes.rows(step), *self._process)
        corpus_B, row_B = self._mixture.rows(self._batch_sizes.first_row(step) + part.start, part.stop - part.start)
        batch: Batch = {}
        for index, (rows, before, key) in enumerate(zip(self._corpora, self._rows_before, self._keys, strict=True)):
            places = np.flatnonzero(corpus_B == index)
            if not len(places):
                continue
            for name, array in rows.take(shuffled(before + row_B[places], len(rows), key)).items():
                whole = batch.setdefault(name, np.empty((len(corpus_B), self._context_length), array.dtype))
                whole[places] = array
        return batch

    def row_counts(self, step: int) -> dict[str, int]:
        """Rows of each corpus read before `step`, those of `rows_before` included."""
        counts = self._mixture.counts(self._batch_sizes.first_row(step))
        return {
            name: before + int(count)
            for name, before, count in zip(self._mixture.names, self._rows_before, counts, strict=True)
        }

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each corpus made before `step`."""
        lengths = dict(zip(self._mixture.names, map(len, self._corpora), strict=True))
        return {name: count / lengths[name] for name, count in self.row_counts(step).items()}

    def iterator(self, first_step: int) -> grain.DatasetIterator:
        """The batches from `first_step` to the last, read ahead by threads. The caller closes it."""
        return iter(grain.MapDataset.source(self)[first_step:].to_iter_dataset(_READ_OPTIONS))


def validation_batches(
    store: Documents,
    context_length: int,
    *,
    batch_rows: int,
    num_batches: int,
    documents_per_example: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """The same held-out rows every time, of all parts of the corpus: this host's part of each batch, arrays [B, T].

    The rows are concatenated documents, cut, or packed examples, in a shuffled order. A store with fewer than
    batch_rows * num_batches rows is used once: the last batch is filled up with padding, and further ones are left out.

    Raises:
      BatchError: a batch cannot be divided among the hosts.
      PackingError: the store holds nothing to predict.
    """
    part = _host_slice(batch_rows, process_index, process_count)
    rows = pack(store, "split" if store.trained is None else "best_fit", context_length, documents_per_example)
    order = shuffled(np.arange(min(len(rows), batch_rows * num_batches)), len(rows), fold_key("validation"))
    batches = []
    for first in range(0, len(order), batch_rows):
        taken = rows.take(order[first : first + batch_rows])
        missing = batch_rows - len(order[first : first + batch_rows])
        batches.append({name: np.pad(array, ((0, missing), (0, 0)))[part] for name, array in taken.items()})
    return batches


def _host_slice(rows: int, process_index: int, process_count: int) -> slice:
    """The rows of this host in a global batch of `rows`."""
    if rows % process_count:
        raise BatchError(
            f"batch_size: a batch of {rows} rows cannot be divided among {process_count} hosts; "
            f"use a multiple of {process_count} rows"
        )
    share = rows // process_count
    return slice(process_index * share, (process_index + 1) * share)
