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


class SlicedArrays:
    """The arrays in a folder by their paths in the state."""

    def __init__(self, folder: Path):
        self._folder = folder
        # What is decoded is not kept: every block is wanted once. Syncing is for whoever knows when it is worth it.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
        self._open: dict[str, ts.TensorStore] = {}

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
            self._open[path] = ts.open(
                self._spec(path) | {"metadata": metadata}, create=True, open=True, context=self._context
            ).result()
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
        """Writes a block, which has all axes of the array, at its place."""
        self._array(path)[_slices(start, block.shape)].write(block).result()

    def read(self, path: str, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The block of a shape, with all axes of the array, at a place."""
        return np.asarray(self._array(path)[_slices(start, shape)].read().result())

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self._open:
            try:
                self._open[path] = ts.open(self._spec(path), open=True, context=self._context).result()
            except ValueError as error:
                raise CheckpointError(f"{self._folder}: {path} cannot be read: {one_line(error)}") from None
        return self._open[path]

    def _spec(self, path: str) -> dict[str, Any]:
        store = {"driver": "ocdbt", "base": f"file://{self._folder.absolute()}", "path": f"{path}/"}
        return {"driver": "zarr3", "kvstore": store}


def _slices(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
