"""The rollouts of one policy as rows to train on, on the host and on disk.

They are written as soon as they are made and named by a digest that every checkpoint keeps: a run that goes on in the
middle of a generation trains on the same completions, of weights that are gone.

Shapes: N rows of a generation, T tokens of a row.
"""

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lightning_jax.errors import UserError
from lightning_jax.generation import Completion, completion_batch
from lightning_jax.input_pipeline.packing import Batch, best_fit_decreasing
from lightning_jax.input_pipeline.prompts import Prompt
from lightning_jax.objectives.policy_gradient import ADVANTAGES, RECORDED

FOLDER = "rollouts"  # in that of the run


class ExperienceError(UserError):
    """Rollouts that a run needs to go on are missing or damaged; one line."""


def as_rows(prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], length: int) -> Batch:
    """A row [T] for each completion, those of a prompt one after the other, with its recorded log-probabilities."""
    completions = [completion for group in groups for completion in group]
    prompt_ids = [prompt.ids for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    rows = completion_batch(prompt_ids, [completion.ids for completion in completions], length)
    rows[RECORDED] = np.zeros(rows["loss_mask"].shape, np.float32)
    rows[RECORDED][rows["loss_mask"]] = np.concatenate([completion.log_probs for completion in completions])
    return rows


def with_advantages(rows: Batch, advantages_PG: np.ndarray, used_P: np.ndarray) -> Batch:
    """The rows with each completion's advantage at its tokens; completions of prompts not used count nowhere."""
    mask_NT = rows["loss_mask"] & np.repeat(used_P, advantages_PG.shape[1])[:, None]
    advantages_NT = np.where(mask_NT, advantages_PG.reshape(-1, 1), 0).astype(np.float32)
    return rows | {"loss_mask": mask_NT, ADVANTAGES: advantages_NT}


def packed(rows: Batch, multiple: int) -> Batch:
    """The same completions in fewer rows, as many in each as fit, and empty rows up to a multiple."""
    length = rows["inputs"].shape[1]
    size_N = np.sum(rows["segment_ids"] > 0, axis=1)
    row_N = best_fit_decreasing(size_N, length)
    count = min(-(-(int(row_N.max()) + 1) // multiple) * multiple, len(row_N))
    together = {name: np.zeros((count, *array.shape[1:]), array.dtype) for name, array in rows.items()}
    filled, segments = np.zeros(count, int), np.zeros(count, int)
    for number, (row, size) in enumerate(zip(row_N, size_N, strict=True)):
        place = slice(filled[row], filled[row] + size)
        for name, array in rows.items():
            together[name][row, place] = array[number, :size]
        filled[row] += size
        segments[row] += 1
        together["segment_ids"][row, place] = segments[row]
    return together


def path_of(folder: pathlib.Path, stage: str, generation: int) -> pathlib.Path:
    return folder / FOLDER / f"{stage}_{generation}.npz"


def digest(rows: Mapping[str, np.ndarray]) -> str:
    """Equal for equal rows."""
    total = hashlib.sha256()
    for name in sorted(rows):
        total.update(f"{name} {rows[name].dtype} {rows[name].shape}".encode())
        total.update(np.ascontiguousarray(rows[name]).tobytes())
    return total.hexdigest()


def write_rows(path: pathlib.Path, rows: Mapping[str, np.ndarray]) -> None:
    """Writes all or nothing."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_rows(path: pathlib.Path, expected: str) -> Batch:
    """The rows of a generation. Raises ExperienceError where they are not those of the digest `expected`."""
    try:
        with np.load(path) as file:
            rows = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        rows = {}
    if digest(rows) != expected:
        raise ExperienceError(
            f"{path}: missing, damaged or of another run, and the weights that made these rollouts are gone; bring "
            "the file back, or begin the stage again in another --workdir with --init_from"
        )
    return rows


def delete_others(folder: pathlib.Path, stage: str, kept: Collection[int]) -> None:
    """Deletes the rollouts of a stage but for those of the generations `kept`."""
    wanted = {path_of(folder, stage, generation) for generation in kept}
    for path in (folder / FOLDER).glob(f"{stage}_*.npz"):
        if path not in wanted:
            path.unlink(missing_ok=True)
