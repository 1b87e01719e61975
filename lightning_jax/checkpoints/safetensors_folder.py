"""A folder of safetensors files, read and written block by block: no tensor is ever held whole.

A file is 8 bytes that give the length of a JSON header (name -> dtype, shape, place in the data), the header, the
data. Every header is checked before anything is read, because files come from anywhere. Nothing else is read: a pickle
runs whatever its author wanted.

Source: the format's description, https://github.com/huggingface/safetensors, and transformers' index of shards.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np

from lightning_jax.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own limit


class SafetensorsError(UserError):
    """A folder whose weights cannot be trusted or read; a line for every reason, with the file."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    file: Path
    offset: int  # of its first byte in the file
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first_row: int, shape: tuple[int, ...], columns: slice = slice(None)) -> np.ndarray:
        """Some rows, of the tensor as a matrix [all but the last axis, last axis], or elements of a single row.

        Of the rows, perhaps only some columns, which alone are then read.
        """
        if 0 in shape:
            return np.empty(shape, self.dtype)[..., columns]
        mapped = np.memmap(self.file, self.dtype, "r", self._place(first_row), shape)
        return np.array(mapped[..., columns])

    def write(self, first_row: int, block: np.ndarray) -> None:
        """The inverse of `read`, into the file of `create`."""
        with open(self.file, "r+b", buffering=0) as file:
            file.seek(self._place(first_row))
            file.write(memoryview(np.ascontiguousarray(block, self.dtype).view(np.uint8).reshape(-1)))

    def _place(self, first_row: int) -> int:
        row = self.shape[-1] if math.prod(self.shape[:-1]) > 1 else 1
        return self.offset + first_row * row * self.dtype.itemsize


def open_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name; reads and checks its index and the header of every file.

    Raises:
        SafetensorsError: no safetensors there, an index that leads elsewhere, a damaged file.
    """
    if (folder / INDEX).is_file():
        files = _indexed(folder)
    elif (folder / WHOLE).is_file():
        files = {WHOLE: None}
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        why = f"; {pickles[0]} is a pickle, which runs code when it is read, and is not opened" if pickles else ""
        raise SafetensorsError(f"{folder}: no {WHOLE} and no {INDEX}{why}; convert the weights to safetensors")
    tensors: dict[str, Tensor] = {}
    problems = []
    for name, expected in files.items():
        try:
            check_place(folder, name)
            found = read_header(folder / name)
        except SafetensorsError as error:
            problems.append(str(error))
            continue
        if expected is None:
            expected = set(found)
        problems += [f"{folder / name}: tensor {tensor} of the index is not in it" for tensor in expected - set(found)]
        problems += [f"{folder / name}: its tensor {tensor} is not in the index" for tensor in set(found) - expected]
        tensors |= found
    if problems:
        raise SafetensorsError("\n".join(sorted(problems)))
    return tensors


def _indexed(folder: Path) -> dict[str, set[str]]:
    """The files that the index names, and the tensors that it says are in them."""
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise SafetensorsError(f"{path}: not an index; it should be a JSON object with a weight_map") from None
    files: dict[str, set[str]] = {}
    for tensor, file in pairs.items():
        _check_name(path, tensor)
        files.setdefault(file, set()).add(tensor)
    outside = sorted(name for name in files if PurePath(name).name != name or not name.endswith(".safetensors"))
    if outside:
        why = "is no safetensors file of the folder; nothing else is read"
        raise SafetensorsError("\n".join(f"{path}: {name!r} {why}" for name in outside))
    return files


def check_place(folder: Path, name: str) -> None:
    """Raises where a file is missing or a link leads out of the folder; into the hub cache's own blobs it may."""
    path = folder / name
    if not path.is_file():
        raise SafetensorsError(f"{path}: {'not a file' if path.exists() else 'missing'}")
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append((folder.parent.parent / "blobs").resolve())
    if path.resolve().parent not in allowed:
        raise SafetensorsError(f"{path}: a link to {path.resolve()}, outside the folder; it is not followed")


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises SafetensorsError where the header does not describe the file exactly."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise SafetensorsError(
                    f"{path}: its header of {length:,} bytes is longer than the file ({size:,} bytes)"
                )
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise SafetensorsError(f"{path}: {error.strerror}") from None
    except SafetensorsError:
        raise
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"{path}: its header is not JSON as safetensors have it: {error}") from None
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    places = []
    for name, entry in header.items():
        tensor, end = _tensor(path, 8 + length, name, entry)
        places.append((tensor.offset, end, name, tensor))
    expected = 8 + length
    for offset, end, name, _ in sorted(places, key=lambda place: place[:2]):
        if offset != expected:
            what = "overlaps another" if offset < expected else "leaves a gap before it"
            raise SafetensorsError(f"{path}: tensor {name} {what}")
        expected = end
    if size != expected:
        what = "it is truncated" if size < expected else "something was added"
        raise SafetensorsError(f"{path}: {size:,} bytes, its header describes {expected:,}; {what}")
    return {name: tensor for _, _, name, tensor in places}


def _check_name(path: Path, name: str) -> None:
    """Raises where a name, in a message, would write more than itself."""
    if not name.isprintable():
        raise SafetensorsError(f"{path}: tensor {name!r} has characters that cannot be printed")


def _tensor(path: Path, start: int, name: str, entry: Any) -> tuple[Tensor, int]:
    _check_name(path, name)
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]} if all(
            type(size) is int and size >= 0 for size in shape
        ):
            pass
        case _:
            raise SafetensorsError(f"{path}: tensor {name} has no dtype, shape and data_offsets as safetensors have")
    if dtype not in DTYPES:
        raise SafetensorsError(f"{path}: tensor {name} is {dtype}; weights are {', '.join(DTYPES)}")
    tensor = Tensor(path, start + first, DTYPES[dtype], tuple(shape))
    if last - first != tensor.nbytes or first < 0:
        raise SafetensorsError(
            f"{path}: tensor {name} has {last - first:,} bytes; {dtype} {shape} are {tensor.nbytes:,} bytes"
        )
    return tensor, start + last


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def plan(
    folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], *, shard_bytes: int
) -> dict[str, Tensor]:
    """Where tensors of these shapes and dtypes will lie: in one file, or in shards of about `shard_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    planned = {}
    for number, names in enumerate(shards, start=1):
        file = WHOLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        offset = len(_header([(name, *shapes[name]) for name in names]))
        for name in names:
            planned[name] = Tensor(folder / file, offset, shapes[name][1], tuple(shapes[name][0]))
            offset += planned[name].nbytes
    return planned


def create(planned: Mapping[str, Tensor]) -> None:
    """Makes the files of a plan, with headers and room for the data; data that are there stay as they are."""
    for path, names in _files(planned).items():
        tensors = [(name, planned[name].shape, planned[name].dtype) for name in names]
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.write(_header(tensors))
            file.truncate(planned[names[-1]].offset + planned[names[-1]].nbytes)


def write_index(folder: Path, planned: Mapping[str, Tensor]) -> None:
    """Writes which file holds which tensor, where there is more than one file."""
    if len(_files(planned)) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in planned.values())},
            "weight_map": {name: tensor.file.name for name, tensor in sorted(planned.items())},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _files(planned: Mapping[str, Tensor]) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for name, tensor in planned.items():
        files.setdefault(tensor.file, []).append(name)
    return files


def _header(tensors: list[tuple[str, tuple[int, ...], np.dtype]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
