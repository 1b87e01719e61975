"""Orbax's part: a dictionary of arrays to and from a folder of OCDBT files, in the background and under any sharding.

Compression is off: it saves 8% of random-looking weights and takes the processor from the training step.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from lightning_jax.checkpoints.manifest import DamagedError

# A part of an array is read without the rest of it, as export does matrix by matrix: no chunk has more than one matrix
# of a stack, nor more bytes than this.
CHUNK_BYTES = 16 << 20
# What Orbax reports when the machine, not the checkpoint, is at fault.
_NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")


class ArrayFiles:
    """Writer and reader of the arrays of a checkpoint."""

    def __init__(self) -> None:
        logging.getLogger("absl").addFilter(_is_news)
        self._handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)

    def start_writing(self, folder: Path, arrays: Mapping[str, jax.Array]) -> Callable[[], None]:
        """Copies this process' shards to the host and starts writing them into the existing, empty `folder`.

        On return the arrays may be donated. The result waits for the files of this process and raises what went wrong.
        Must not be called from a thread with a running event loop.
        """
        chunks = {
            path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(array.ndim - 2)))
            for path, array in arrays.items()
        }
        args = ocp.args.PyTreeSave(dict(arrays), save_args=chunks)
        save = self._handler.async_save(epath.Path(folder), args=args)
        futures = asyncio.run(save) or []

        def finish() -> None:
            for future in futures:
                future.result()

        return finish

    def merge(self, folder: Path) -> None:
        """Joins the files of all processes; process 0 calls it when every process has finished writing."""
        self._handler.finalize(epath.Path(folder))

    def read(self, folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Those arrays, in the given shapes, dtypes and shardings. Raises DamagedError where the files lack them."""
        restore_args = {
            path: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for path, leaf in shapes.items()
        }
        args = ocp.args.PyTreeRestore(item=dict(shapes), restore_args=restore_args, partial_restore=True)
        try:
            return self._handler.restore(epath.Path(folder), args=args)
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax and TensorStore raise ValueError, KeyError, OSError, ... for the same damage
            if any(code in str(error) for code in _NOT_DAMAGE):
                raise
            raise DamagedError(f"its arrays cannot be read: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What went wrong, short enough for a line; TensorStore's messages go on for paragraphs."""
    if "No space left on device" in str(error):
        return "no space left on device"
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def _is_news(record: logging.LogRecord) -> bool:
    """False for the traceback Orbax logs of an exception that its future then raises to us."""
    return not ("/orbax/" in record.pathname and record.funcName == "run")
