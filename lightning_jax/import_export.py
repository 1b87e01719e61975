"""Weights between Hugging Face's safetensors and our checkpoints, block by block in both directions.

A conversion works in `<target>.converting`, where a journal names the pieces that are on disk, and renames the folder
when all is there: a target is whole or it does not exist, and a conversion that was interrupted goes on where it was.
Never more than a few blocks are in memory, or of a checkpoint that training saved, a matrix. Our fingerprints are sums
over elements, so they are made while importing, and checked while exporting, block by block too.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from lightning_jax.checkpoints import Manifest, run_lock, safetensors_folder
from lightning_jax.checkpoints.fingerprint import block_sums, written
from lightning_jax.checkpoints.manifest import Leaf, files_in, library_versions, sync_folder, sync_tree
from lightning_jax.checkpoints.restoring import ARRAYS
from lightning_jax.checkpoints.run_lock import LOCK
from lightning_jax.checkpoints.sliced_arrays import SlicedArrays
from lightning_jax.model_folders import (
    BASE,
    CHECKPOINTS,
    CONFIG,
    ORIGINAL,
    Dtype,
    HuggingFaceFolder,
    ModelFolderError,
    RunFolder,
    read_texts,
)
from lightning_jax.models import HybridLM, RewardModel, hugging_face
from lightning_jax.models.hugging_face import Piece
from lightning_jax.models.hugging_face_config import caveats, write_config
from lightning_jax.stored_config import to_store
from lightning_jax.text_files import copy_texts, padding_token, write_json, write_texts
from lightning_jax.weights import HostAdapters

BLOCK_ELEMENTS = 2 << 20
SYNC_ELEMENTS = 1 << 30  # so much is synced to disk and put on record at once
SHARD_BYTES = 5_000_000_000
WORKING, JOURNAL = ".converting", "journal.json"
Say = Callable[[str], None]


def import_model(source: HuggingFaceFolder, target: Path, *, say: Say) -> None:
    """Makes of a Hugging Face checkpoint one of ours, as step 0 of a run folder; its text files come along.

    Raises:
        UserError: the target exists, or the tokenizer does not fit the weights.
    """
    config, tensors = source.config, source.tensors
    read_texts(source, config.vocab_size)
    leaves = {
        _leaf_path(path): Leaf(leaf.shape, str(leaf.dtype), "")
        for path, leaf in hugging_face.parameter_shapes(config).items()
    }
    identity = {
        "import": str(source.path.absolute()),
        "fields": source.fields,
        "files": {str(path): path.stat().st_mtime_ns for path in sorted({t.file for t in tensors.values()})},
        "dtype": config.param_dtype,
    }
    with _working_folder(target, identity, say) as (folder, journal):
        step = folder / CHECKPOINTS / "0"
        arrays = SlicedArrays(step / ARRAYS)
        arrays.create(leaves, {_leaf_path(piece.path): _chunk(piece) for piece in source.pieces})

        def convert(piece: Piece) -> Iterator[np.ndarray]:
            path = _leaf_path(piece.path)
            for block in piece.blocks(BLOCK_ELEMENTS):
                theirs = tensors[piece.tensor].read(block.first_row, block.shape)
                ours = np.ascontiguousarray(block.ours(theirs), jnp.dtype(leaves[path].dtype))
                arrays.write(path, block.start, ours)
                yield block_sums(ours, block.start)

        sums = _convert(source.pieces, journal, convert, arrays.flush, say)
        copy_texts(source.path, folder / ORIGINAL)
        shutil.copyfile(source.path / CONFIG, folder / ORIGINAL / CONFIG)
        metadata = {
            **to_store(config),
            "context_length": source.context_length,
            "router_dtype": source.router_dtype,
        }
        Manifest(
            step=0,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=library_versions(),
            leaves={path: dataclasses.replace(leaf, fingerprint=written(sums[path])) for path, leaf in leaves.items()},
            files=files_in(step),
            metadata=json.loads(json.dumps(metadata)),
        ).write(step)


def export_model(
    source: RunFolder,
    target: Path,
    *,
    names: Literal["released", "transformers"] | None,
    dtype: Dtype | None,
    shard_bytes: int = SHARD_BYTES,
    say: Say,
) -> None:
    """Makes of our newest checkpoint a Hugging Face folder that transformers and vLLM load; adapters are merged.

    A reward model becomes one of transformers' ...ForSequenceClassification, with one label.

    Args:
        names: of a MiniMax model's config.json: the released one, or transformers' port of it; None for those that it
            was imported with, transformers' for a model of our own.
        dtype: of the weights; None for that of the checkpoint. Routers stay as they were imported, else float32.
        shard_bytes: about the size of each file.

    Raises:
        UserError: the target exists, no known architecture computes the model, or the checkpoint is damaged.
    """
    config, manifest, scores = source.config(), source.manifest, source.is_reward_model
    dtype = dtype or config.param_dtype
    fields = write_config(
        config, names, source.fields, dtype=dtype, context_length=source.context_length, scores=scores
    )
    texts = read_texts(source, config.vocab_size)
    if texts.tokenizer and "eos_token_id" not in fields:
        fields |= {"bos_token_id": texts.tokenizer.bos_id, "eos_token_id": texts.tokenizer.eos_id}
    if scores:
        fields |= {"pad_token_id": padding_token(texts)}
    for caveat in caveats(config, fields):
        say(caveat)
    all_pieces = hugging_face.reward_model_pieces if scores else hugging_face.pieces
    pieces = all_pieces(config, hugging_face.feed_forward_names(config))
    changes, folders = HostAdapters(0.0, {}), [source]
    if source.adapters:
        kind = RewardModel if scores else HybridLM
        changes = HostAdapters.read(source.path, config, source.adapters, kind=kind, say=say)
        folders.append(RunFolder.open(source.path / BASE))
    holders = {path: folder for folder in folders for path in folder.manifest.leaves}
    router_dtype = manifest.metadata.get("router_dtype", "float32")
    dtypes = {piece.tensor: jnp.dtype(router_dtype if piece.is_router else dtype) for piece in pieces}
    leaves = {path: folder.manifest.leaves[path] for path, folder in holders.items()}
    shapes = {name: (shape, dtypes[name]) for name, shape in hugging_face.tensor_shapes(pieces).items()}
    identity = {
        "export": str(source.path.absolute()),
        "leaves": {path: str(leaf) + leaf.fingerprint for path, leaf in leaves.items()},
        "config": fields,
        "router_dtype": router_dtype,
        "shard_bytes": shard_bytes,
    }
    with _working_folder(target, identity, say) as (folder, journal):
        tensors = safetensors_folder.plan(folder, shapes, shard_bytes=shard_bytes)
        safetensors_folder.create(tensors)
        stored = {each.path: SlicedArrays(_checkpoint(each) / ARRAYS) for each in folders}

        def convert(piece: Piece) -> Iterator[np.ndarray]:
            path = _leaf_path(piece.path)
            arrays = stored[holders[path].path]
            # What training saved is in chunks of its own: a block would read, again and again, all that it touches.
            in_blocks = arrays.chunk_shape(path) == _chunk(piece)
            (whole,) = piece.blocks(math.prod(piece.shape))
            matrix = None if in_blocks else whole.theirs(arrays.read(path, whole.start, whole.our_shape))
            for block in piece.blocks(BLOCK_ELEMENTS):
                if in_blocks:
                    theirs = block.theirs(arrays.read(path, block.start, block.our_shape))
                else:
                    theirs = matrix[block.first_row - piece.first_row :][: block.shape[0]]
                ours = block.ours(theirs)
                merged = changes.merge(piece.path, block.start, ours)
                tensors[piece.tensor].write(block.first_row, block.theirs(merged))
                yield block_sums(ours, block.start)

        sums = _convert(pieces, journal, convert, lambda: None, say)
        damaged = [path for path, found in sums.items() if written(found) != leaves[path].fingerprint]
        if damaged:
            shutil.rmtree(folder)
            why = "has another fingerprint than when it was saved; delete that step to export the one before"
            raise ModelFolderError("\n".join(f"{_checkpoint(holders[path])}: {path} {why}" for path in damaged))
        write_texts(texts, folder, fields)
        safetensors_folder.write_index(folder, tensors)
        write_json(folder / CONFIG, fields)


def _checkpoint(folder: RunFolder) -> Path:
    return folder.path / CHECKPOINTS / str(folder.manifest.step)


def _leaf_path(path: str) -> str:
    """Of a parameter in a checkpoint."""
    return f"params/{path}/value"


def _chunk(piece: Piece) -> tuple[int, ...]:
    """The chunks that an array is stored in: the blocks that it is written in."""
    shape = piece.block_shape(BLOCK_ELEMENTS)
    return (*(1 for _ in piece.index), *(shape[::-1] if piece.transposed else shape))


def _convert(
    pieces: Sequence[Piece],
    journal: "Journal",
    convert: Callable[[Piece], Iterable[np.ndarray]],
    flush: Callable[[], None],
    say: Say,
) -> dict[str, np.ndarray]:
    """Converts what the journal does not have yet; the two sums of every array of ours: its fingerprint.

    Args:
        convert: yields what each block of a piece adds to the sums.
        flush: waits until what was converted is in the files.
    """
    if journal.sums:
        say(f"going on after {len(journal.sums):,} of {len(pieces):,} pieces that an earlier conversion left")
    elements = 0
    try:
        for number, piece in enumerate(pieces):
            if number not in journal.sums:
                journal.sums[number] = np.sum(list(convert(piece)), axis=0, dtype=np.uint32)
                elements += math.prod(piece.shape)
            if elements >= SYNC_ELEMENTS:
                flush()
                journal.write()
                elements = 0
    finally:  # after Ctrl-C too
        flush()
        journal.write()
    totals: dict[str, np.ndarray] = {}
    for number, piece in enumerate(pieces):
        path = _leaf_path(piece.path)
        totals[path] = totals.get(path, np.zeros(2, np.uint32)) + journal.sums[number]
    return totals


@dataclass(frozen=True)
class Journal:
    """The sums of every piece that was converted; in a file, of those that are safely on disk."""

    path: Path
    identity: str
    sums: dict[int, np.ndarray]

    @classmethod
    def open(cls, path: Path, identity: str) -> "Journal":
        """What the folder's journal has; empty where there is none, or another conversion's, or files were lost."""
        try:
            found = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            found = {}
        if found.get("identity") != identity or not found["files"].items() <= _data_files(path.parent).items():
            return cls(path, identity, {})
        return cls(path, identity, {int(number): np.array(each, np.uint32) for number, each in found["sums"].items()})

    def write(self) -> None:
        """Syncs the folder, then puts on record what is in it."""
        sync_tree(self.path.parent)
        sums = {number: each.tolist() for number, each in self.sums.items()}
        record = {"identity": self.identity, "sums": sums, "files": _data_files(self.path.parent)}
        replacement = self.path.with_suffix(".new")
        replacement.write_text(json.dumps(record))
        replacement.rename(self.path)


def _data_files(folder: Path) -> dict[str, int]:
    """The sizes of the files that have weights: they are written once, or where they were laid out."""
    files = (*folder.glob("*.safetensors"), *(folder / CHECKPOINTS / "0" / ARRAYS / "d").glob("*"))
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


@contextlib.contextmanager
def _working_folder(target: Path, identity: Any, say: Say) -> Iterator[tuple[Path, Journal]]:
    """A folder to work in, with what an earlier conversion of the same left; becomes the target if all goes well."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelFolderError(f"{target}: it exists already; name a new folder")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = target.with_name(target.name + WORKING)
    with run_lock(folder):
        journal = Journal.open(folder / JOURNAL, digest)
        if not journal.sums:  # what is there, if anything, is of another conversion or not on record
            for path in folder.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield folder, journal
        sync_tree(folder)
        journal.path.unlink()
        (folder / LOCK).unlink()
        folder.rename(target)
        sync_folder(target.parent)
