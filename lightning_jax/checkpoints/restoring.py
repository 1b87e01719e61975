"""Reading a checkpoint: from the newest step down to the newest that verifies, leaf by leaf.

A checkpoint is damaged when its manifest is missing or altered, a file is missing or has another size or index, its
arrays cannot be read, or an array has another fingerprint than the one computed on the devices when it was saved. A
damaged checkpoint costs one line and the steps since the one before it; a checkpoint of another model is an error.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lightning_jax.checkpoints import processes, state_tree
from lightning_jax.checkpoints.array_files import ArrayFiles
from lightning_jax.checkpoints.fingerprint import fingerprints
from lightning_jax.checkpoints.manifest import CheckpointError, DamagedError, Leaf, Manifest, sync_folder

ARRAYS = "arrays"  # Orbax's folder in that of a step
REJECTED = ".rejected"


@dataclass(frozen=True)
class Restored:
    step: int
    state: Any  # of the abstract state's tree, shapes, dtypes and shardings
    metadata: dict[str, Any]


def restore_newest(
    folder: Path,
    abstract_state: Any,
    *,
    say: Callable[[str], None],
    partial: bool = False,
    set_aside: bool = False,
) -> Restored | None:
    """The newest checkpoint under `folder` that verifies, or None where none was ever written.

    Args:
        abstract_state: the state to restore into: a pytree of jax.ShapeDtypeStruct, with shardings where the arrays
            shall not be on the default device. Any mesh and number of devices will do.
        say: takes one line for every step that was rejected.
        partial: leave what `abstract_state` does not have in the checkpoint, e.g. read the parameters alone.
        set_aside: rename rejected steps to `<step>.rejected`; only the run that writes the folder may.

    Raises:
        CheckpointError: there are checkpoints, but none verifies; or one is of another architecture, dtype or shape.
    """
    leaves = state_tree.named_leaves(abstract_state)
    tell = say if processes.is_primary() else lambda line: None
    rejected: list[int] = []
    for step in sorted(committed_steps(folder), reverse=True):
        reason = ""
        try:
            manifest = read_manifest(folder, step)
        except DamagedError as damage:
            reason = str(damage)
        if processes.all_agree(not reason):
            if difference := first_difference(manifest.leaves, leaves, partial):
                raise CheckpointError(
                    f"checkpoint {step} in {folder} is of another model: {difference}; use the configuration it was "
                    "saved with, or another folder"
                )
            try:
                path = (folder / str(step) / ARRAYS).absolute()  # Orbax takes no other
                arrays = ArrayFiles().read(path, state_tree.stored_shapes(leaves))
            except DamagedError as damage:
                reason = str(damage)
        if processes.all_agree(not reason):
            reason = fingerprint_difference(manifest, arrays)
        if processes.all_agree(not reason):
            for bad in rejected if set_aside and processes.is_primary() else ():
                _set_aside(folder, bad)
            state = state_tree.rebuild(abstract_state, state_tree.restored_leaves(leaves, arrays))
            return Restored(step, state, manifest.metadata)
        rejected.append(step)
        tell(f"checkpoint {step} rejected: {reason or 'another process could not read it'}")
    if count := len(rejected) + len(list(folder.glob(f"*{REJECTED}*"))):
        raise CheckpointError(
            f"no checkpoint in {folder} can be used ({count} rejected); restore one from a copy, or move the folder "
            "away to start from step 0"
        )
    return None


def newest_manifest(folder: Path) -> Manifest | None:
    """The manifest, with the metadata, of the newest step whose manifest and files are whole; reads no array."""
    for step in sorted(committed_steps(folder), reverse=True):
        try:
            return read_manifest(folder, step)
        except DamagedError:
            continue
    return None


def committed_steps(folder: Path) -> list[int]:
    """The steps with a folder of their own name. Whether they hold what they should is for `read_manifest` to say."""
    return [int(path.name) for path in folder.glob("*") if re.fullmatch(r"0|[1-9][0-9]*", path.name)]


def read_manifest(folder: Path, step: int) -> Manifest:
    """Raises DamagedError where the manifest, the step in it, or the list of files is not as it was written."""
    manifest = Manifest.read(folder / str(step))
    if manifest.step != step:
        raise DamagedError(f"its manifest is that of step {manifest.step}")
    manifest.check_files(folder / str(step))
    return manifest


def first_difference(saved: Mapping[str, Leaf], expected: Mapping[str, jax.ShapeDtypeStruct], partial: bool) -> str:
    """The first leaf that differs between a manifest and an abstract state, in words; empty where none does."""
    for path, leaf in expected.items():
        shape = f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"
        if path not in saved:
            return f"it has no {path}, which is {shape} here"
        if str(saved[path]) != shape:
            return f"{path} is {saved[path]} there and {shape} here"
    for path, there in saved.items():
        if path not in expected and not partial:
            return f"it has {path}, {there}, which is not here"
    return ""


def fingerprint_difference(manifest: Manifest, arrays: Mapping[str, jax.Array]) -> str:
    """The first array that is not the one that was saved, in words; empty where all are."""
    for path, found in fingerprints(arrays)().items():
        if found != (saved := manifest.leaves[path].fingerprint):
            return f"leaf {path} has fingerprint {found}, not {saved}"
    return ""


def _set_aside(folder: Path, step: int) -> None:
    target, count = folder / f"{step}{REJECTED}", 1
    while target.exists():
        count += 1
        target = folder / f"{step}{REJECTED}-{count}"
    (folder / str(step)).rename(target)
    sync_folder(folder)
