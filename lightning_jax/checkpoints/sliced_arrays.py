"""The arrays of a checkpoint, written and read block by block, so that none has to fit into memory.

The files are those of `array_files`: whoever reads a checkpoint cannot tell which of the two wrote it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lightning_jax.checkpoints.array_files import one_line
from lightning_jax.checkpoints.manifest import CheckpointError, Leaf

TREE = "_METADATA"  # Orbax's description of the arrays' names
# Every commit is a file, and stores nodes of the database's tree anew: at the 8 MB that they may have and a commit for
# every block they would outgrow the arrays.
NODE_BYTES = 65536
BLOCKS_PER_COMMIT = 4
CHUNKS_AT_ONCE = 4


class SlicedArrays:
    """The arrays in a folder by their paths in the state."""

    def __init__(self, folder: Path):
        self._folder = folder
        # What is decoded is not kept: every block is wanted once.
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "file_io_concurrency": {"limit": CHUNKS_AT_ONCE},
                "data_copy_concurrency": {"limit": CHUNKS_AT_ONCE},
            }
        )
        self._open: dict[str, ts.TensorStore] = {}
        self._pending: list[tuple[str, ts.WriteFutures]] = []

    def create(self, arrays: Mapping[str, Leaf], chunks: Mapping[str, tuple[int, ...]]) -> None:
        """Makes empty arrays, stored in chunks of these shapes; those that are there stay as they are."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path, leaf in arrays.items():
            metadata = {
                "shape": leaf.shape,
                "data_type": leaf.dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks[path]}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                "fill_value": 0.0,
            }
            spec = self._spec(path) | {"metadata": metadata}
            spec["kvstore"]["config"] = {"max_decoded_node_bytes": NODE_BYTES}
            try:
                self._open[path] = ts.open(spec, create=True, open=True, context=self._context).result()
            except (ValueError, OSError) as error:
                raise self._unusable(path, "created", error) from None
        values = {
            str((path,)): {
                "key_metadata": [{"key": path, "key_type": 2}],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(leaf.shape),
                },
            }
            for path, leaf in arrays.items()
        }
        tree = {"tree_metadata": values, "use_ocdbt": True, "use_zarr3": True, "custom_metadata": None}
        (self._folder / TREE).write_text(json.dumps(tree | {"store_array_data_equal_to_fill_value": True}))

    def write(self, path: str, start: tuple[int, ...], block: np.ndarray) -> None:
        """Begins to write a block, which has all axes of the array, at its place; it must not change until `flush`."""
        self._pending.append((path, self._array(path)[_slices(start, block.shape)].write(block)))
        if len(self._pending) == BLOCKS_PER_COMMIT:
            self.flush()

    def flush(self) -> None:
        """Waits until all blocks are in the files. Raises CheckpointError where one cannot be written."""
        while self._pending:
            path, future = self._pending[0]
            try:
                future.result()
            except (ValueError, OSError) as error:
                raise self._unusable(path, "written", error) from None
            del self._pending[0]  # only now: whoever is interrupted while waiting can wait again

    def chunk_shape(self, path: str) -> tuple[int, ...]:
        """The least that can be read of an array."""
        return tuple(self._array(path).chunk_layout.read_chunk.shape)

    def read(self, path: str, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The block of a shape, with all axes of the array, at a place. Raises CheckpointError where it is damaged."""
        try:
            return np.asarray(self._array(path)[_slices(start, shape)].read().result())
        except (ValueError, OSError) as error:
            raise self._unusable(path, "read", error) from None

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self._open:
            try:
                self._open[path] = ts.open(self._spec(path), open=True, context=self._context).result()
            except (ValueError, OSError) as error:
                raise self._unusable(path, "read", error) from None
        return self._open[path]

    def _unusable(self, path: str, done: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self._folder}: {path} cannot be {done}: {one_line(error)}")

    def _spec(self, path: str) -> dict[str, Any]:
        store = {"driver": "ocdbt", "base": f"file://{self._folder.absolute()}", "path": f"{path}/"}
        return {"driver": "zarr3", "kvstore": store}


def _slices(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
