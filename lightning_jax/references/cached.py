"""A cached reference: log-probabilities under the model as the stage began, computed once and kept.

They lie in the run's folder with a key: a fingerprint of the weights that gave them, of the tokens and masks of every
corpus (which the chat template and the tokenizer have made), and what else they depend on. A run that goes on in the
middle of the stage no longer has those weights; it trusts the file only if its key is the one in the checkpoint.
"""

import dataclasses
import functools
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from lightning_jax.input_pipeline import PreparedCorpus
from lightning_jax.input_pipeline.examples import pack
from lightning_jax.input_pipeline.packing import Documents
from lightning_jax.objectives.preference import REFERENCE
from lightning_jax.references.running_stage import Key, RunningStage, fingerprint_of

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class WithReference:
    """Documents with a log-probability for each."""

    store: Documents
    log_probs: np.ndarray  # float32 [documents]

    @property
    def document_values(self) -> dict[str, np.ndarray]:
        return {**self.store.document_values, REFERENCE: self.log_probs}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def with_reference(
    corpora: Mapping[str, PreparedCorpus], weights: nnx.State, running: RunningStage
) -> tuple[dict[str, PreparedCorpus], Key]:
    """The corpora with the reference's log-probabilities, from the run's folder or computed now, and their key.

    Args:
      weights: of the model; the reference itself at the stage's beginning.

    Raises:
      ReferenceError: the run goes on in the middle of the stage, and the file is missing or not the one it began with.
    """
    stage, saved_key = running.stage, running.saved_key
    path = running.folder / f"{stage.name}.npz"
    key = {
        "weights": fingerprint_of(weights) if saved_key is None else saved_key["weights"],
        "data": {name: {split: getattr(each, split).fingerprint for split in SPLITS} for name, each in corpora.items()},
        "context_length": stage.config.context_length,
        "rope_theta": stage.config.rope_theta,
    }
    found, arrays = _read(path)
    if found != key:
        if saved_key is not None:
            raise running.refusal(path, "is of other weights or data" if found else "is missing or damaged")
        compute = functools.partial(_log_probs, weights=weights, running=running)
        arrays = {
            f"{name}/{split}": compute(getattr(corpus, split))
            for name, corpus in sorted(corpora.items())
            for split in SPLITS
        }
        if jax.process_index() == 0:
            _write(path, key, arrays)
        chats = sum(map(len, arrays.values()))
        running.say(f"stage {stage.name}: reference log-probabilities of {chats:,} chats in {path}")
    return {
        name: dataclasses.replace(
            corpus, **{split: WithReference(getattr(corpus, split), arrays[f"{name}/{split}"]) for split in SPLITS}
        )
        for name, corpus in corpora.items()
    }, key


def _log_probs(store: Documents, *, weights: nnx.State, running: RunningStage) -> np.ndarray:
    """The log-probability of what is trained of each document, float32 [documents]."""
    log_probs = np.zeros(len(store.offsets) - 1, np.float32)
    if not len(log_probs):
        return log_probs
    stage, programs = running.stage, running.programs
    rows = pack(store, "best_fit", stage.config.context_length, stage.config.documents_per_example)
    step, count = programs.log_prob_step(stage), programs.evaluation_rows(stage)
    host = programs.host
    share = count // host.count
    own = slice(host.index * share, (host.index + 1) * share)
    for first in range(0, len(rows), count):
        running.progress("computing the reference's log-probabilities")
        taken = np.arange(first, min(first + count, len(rows)))
        # Rows are taken again to fill the last batch: every batch is one shape.
        batch = rows.take(np.resize(taken, count)[own])
        values_BT = multihost_utils.process_allgather(step(weights, programs.on_devices(batch)), tiled=True)
        row, column, document = rows.documents(taken)
        log_probs[document] = np.asarray(values_BT)[row, column]
    return log_probs


def _read(path: pathlib.Path) -> tuple[Key | None, dict[str, np.ndarray]]:
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return json.loads(str(arrays.pop("key"))), arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None, {}


def _write(path: pathlib.Path, key: Key, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, key=json.dumps(key, sort_keys=True), **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
