"""The checkpoints of one run: when to save, saving without stopping the training, what to keep.

A step is saved in `<step>.saving`: Orbax writes the arrays in the background, everything is synced to disk, the
manifest is written last, and the folder is renamed to `<step>`. That rename is the commit: a folder named by a number
is whole, or it was damaged afterwards. A step is deleted by renaming it to `<step>.deleting` first. So a kill at any
moment leaves committed steps and leftovers that tell themselves apart; the next start removes the leftovers.

The folder must be on a file system with atomic renames (local disk, NFS, Lustre, Filestore), seen by all processes.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import jax

from lightning_jax.checkpoints import processes, state_tree
from lightning_jax.checkpoints.array_files import ArrayFiles, one_line
from lightning_jax.checkpoints.config import CheckpointConfig
from lightning_jax.checkpoints.fingerprint import fingerprints
from lightning_jax.checkpoints.manifest import (
    CheckpointError,
    Leaf,
    Manifest,
    files_in,
    library_versions,
    sync_folder,
    sync_tree,
)
from lightning_jax.checkpoints.restoring import ARRAYS, Restored, committed_steps, restore_newest

logger = logging.getLogger(__name__)

SAVING, DELETING = ".saving", ".deleting"

# With several processes the clock of process 0 decides for all, which costs a broadcast: ask it this often.
_CLOCK_EVERY_STEPS = 16


class Checkpoints:
    """Writes and reads the checkpoints under one folder. One run at a time may hold it: see `run_lock`.

    Every process of the run must construct it and call its methods in the same order. `say` takes one line for
    everything a user should know: a save that failed, a step that was rejected.
    """

    def __init__(
        self, folder: str | os.PathLike, config: CheckpointConfig, *, say: Callable[[str], None] = logger.warning
    ) -> None:
        self.folder = Path(folder).absolute()
        self.config = config
        self._say = say
        self._array_files = ArrayFiles()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._failures = 0
        self._last_saved_at: float | None = None
        if processes.is_primary():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        processes.all_agree(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def due(self, step: int, now: float) -> bool:
        """Whether `step` should be saved. `now` is in seconds of any clock that never goes back.

        Also reports the end of a save in the background, so call it every step.
        """
        if self._pending and self._pending[1].done():
            self._finish_pending()
        if self._last_saved_at is None:
            self._last_saved_at = now
        by_step = self.config.every_steps and step % self.config.every_steps == 0
        by_time = self.config.every_minutes and now - self._last_saved_at >= 60 * self.config.every_minutes
        if self.config.every_minutes and jax.process_count() > 1:
            by_time = step % _CLOCK_EVERY_STEPS == 0 and processes.primary_says(bool(by_time))
        if by_step or by_time:
            self._last_saved_at = now
        return bool(by_step or by_time)

    def save(self, step: int, state: Any, metadata: dict[str, Any], *, wait: bool = False) -> bool:
        """Starts saving `state`, a pytree of jax.Array; returns when it is copied to the host, so it may be donated.

        Args:
            metadata: whatever JSON holds; comes back from `restore` as JSON does, with lists for tuples.
            wait: return when the checkpoint is committed.

        Returns:
            Whether the step is saved or being saved. A save that fails, now or later, costs one line and that step.

        Raises:
            CheckpointError: the state or the metadata cannot be saved, or `max_failures` saves in a row have failed.
        """
        leaves = state_tree.named_leaves(state)
        arrays = state_tree.stored_arrays(leaves)
        metadata = _as_json(metadata)
        if processes.is_primary() and self._pending and not self._pending[1].done():
            self._say(f"checkpoint {self._pending[0]} takes longer to save than the interval; step {step} waits for it")
        self._finish_pending()
        if not processes.primary_says(step in committed_steps(self.folder)):
            if not processes.primary_says(processes.is_primary() and self._prepare(step, arrays)):
                return False
            sums = fingerprints(arrays)
            arrays_folder = self._saving(step) / ARRAYS
            finish = self._writer.submit(self._array_files.start_writing, arrays_folder, arrays).result()
            shapes = {path: (leaf.shape, str(leaf.dtype)) for path, leaf in leaves.items()}
            barrier = processes.reserve_barrier()
            self._pending = step, self._writer.submit(self._commit, step, shapes, sums, finish, metadata, barrier)
        if wait:
            self.wait()
            return step in committed_steps(self.folder)
        return True

    def restore(self, abstract_state: Any, *, say: Callable[[str], None] | None = None) -> Restored | None:
        """`restore_newest` of this run's folder; rejected steps are renamed to `<step>.rejected`."""
        self.wait()
        return restore_newest(self.folder, abstract_state, say=say or self._say, set_aside=True)

    def wait(self) -> None:
        """Waits until the save under way is committed or has failed, on every process."""
        self._finish_pending()
        processes.all_agree(True)

    def close(self) -> None:
        """Waits for the save under way and ends the background thread."""
        try:
            self._finish_pending()
        finally:
            self._writer.shutdown()

    def _prepare(self, step: int, arrays: Mapping[str, jax.Array]) -> bool:
        """Makes the folder to save into, if the disk has room."""
        needed = sum(array.nbytes for array in arrays.values())
        try:
            self._remove_leftovers()
            if needed > (free := shutil.disk_usage(self.folder).free):
                raise OSError(f"{needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free on the disk")
            (self._saving(step) / ARRAYS).mkdir(parents=True)
        except OSError as error:
            self._count_failure(step, error)
            return False
        return True

    def _commit(
        self,
        step: int,
        shapes: dict[str, tuple[tuple[int, ...], str]],
        sums: Callable[[], dict[str, str]],
        finish_writing: Callable[[], None],
        metadata: dict[str, Any],
        barrier: str,
    ) -> None:
        """In the background: waits for the files, then makes them a checkpoint and applies the keep-policy."""
        folder = self._saving(step)
        written = folder / f"written.{jax.process_index()}"
        try:
            finish_writing()
            written.touch()
        finally:
            processes.wait_at(barrier)
        if not processes.is_primary():
            return
        for index in range(jax.process_count()):
            if not (marker := folder / f"written.{index}").exists():
                raise OSError(f"process {index} did not write its part")
            marker.unlink()
        self._array_files.merge(folder / ARRAYS)
        sync_tree(folder)
        fingerprint = sums()
        Manifest(
            step=step,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=library_versions(),
            leaves={path: Leaf(*shape, fingerprint=fingerprint.get(path, "")) for path, shape in shapes.items()},
            files=files_in(folder),
            metadata=metadata,
        ).write(folder)
        folder.rename(self.folder / str(step))
        sync_folder(self.folder)
        self._delete_old()

    def _delete_old(self) -> None:
        steps = committed_steps(self.folder)
        for step in set(steps) - self.config.keeps(steps):
            doomed = self.folder / f"{step}{DELETING}"
            try:
                (self.folder / str(step)).rename(doomed)
                sync_folder(self.folder)
                shutil.rmtree(doomed)
            except OSError as error:  # the new checkpoint is none the worse
                logger.warning("checkpoint %d, no longer needed, could not be deleted: %s", step, error)

    def _remove_leftovers(self) -> None:
        for pattern in (f"*{SAVING}", f"*{DELETING}"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover)
                logger.info("removed %s, left by a save or a deletion that did not end", leftover)

    def _finish_pending(self) -> None:
        if not self._pending:
            return
        step, future = self._pending
        self._pending = None
        if error := future.exception():
            self._count_failure(step, error)
        else:
            self._failures = 0

    def _count_failure(self, step: int, error: BaseException) -> None:
        """Says which save was lost and frees its space. Raises after `max_failures` in a row."""
        if processes.is_primary():
            shutil.rmtree(self._saving(step), ignore_errors=True)
        self._failures += 1
        line = f"checkpoint {step} could not be saved in {self.folder}: {one_line(error)}"
        if 0 < self.config.max_failures <= self._failures:
            raise CheckpointError(f"{line}; that is {self._failures} in a row, so the run stops") from error
        self._say(f"{line}; the run goes on")

    def _saving(self, step: int) -> Path:
        return self.folder / f"{step}{SAVING}"


def _as_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """A copy of the metadata as it will come back, taken now because the caller's may change."""
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata of a checkpoint must be what JSON holds: {error}") from None
