"""The manifest of a checkpoint: what was saved, file by file and leaf by leaf; the last file written."""

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from lightning_jax.errors import UserError

MANIFEST = "MANIFEST.json"
FORMAT = 1
_SMALL_FILE = 65536  # bytes
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class CheckpointError(UserError):
    """A checkpoint that cannot be used as asked; the message is one line that says why and what to do."""


class DamagedError(Exception):
    """A checkpoint is not what its manifest says; the message completes "checkpoint 300 rejected: ..."."""


@dataclass(frozen=True)
class Leaf:
    shape: tuple[int, ...]
    dtype: str
    fingerprint: str  # of fingerprint.py

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class File:
    size: int  # bytes
    crc32: int | None  # of a small file: the index and Orbax's metadata, which no fingerprint covers

    @classmethod
    def of(cls, path: Path) -> "File":
        size = path.stat().st_size
        return cls(size, zlib.crc32(path.read_bytes()) if size <= _SMALL_FILE else None)


@dataclass(frozen=True)
class Manifest:
    step: int
    saved_at: str  # UTC, ISO 8601
    versions: dict[str, str]  # of the libraries that wrote it
    leaves: dict[str, Leaf]  # by path in the state
    files: dict[str, File]  # by path in the checkpoint's folder
    metadata: dict[str, Any]  # the caller's: whatever JSON holds

    def write(self, folder: Path) -> None:
        """Writes the manifest and makes it and its folder durable."""
        body = {"format": FORMAT, **asdict(self)}
        with open(folder / MANIFEST, "w") as file:
            json.dump({**body, "sha256": _checksum(body)}, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises DamagedError, or CheckpointError where another version of this package wrote it."""
        try:
            body = json.loads((folder / MANIFEST).read_text())
            checksum = body.pop("sha256")
        except (FileNotFoundError, NotADirectoryError):
            raise DamagedError(f"it has no {MANIFEST}") from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamagedError(f"{MANIFEST} is not readable") from None
        if checksum != _checksum(body):
            raise DamagedError(f"{MANIFEST} does not match its own checksum")
        if (written := body.pop("format")) != FORMAT:
            raise CheckpointError(f"{folder} has checkpoint format {written}; this version reads format {FORMAT}")
        leaves = {path: Leaf(**{**leaf, "shape": tuple(leaf["shape"])}) for path, leaf in body.pop("leaves").items()}
        files = {name: File(**file) for name, file in body.pop("files").items()}
        return cls(leaves=leaves, files=files, **body)

    def check_files(self, folder: Path) -> None:
        """Raises DamagedError where a file is missing, has another size or, where it is small, another content."""
        for name, saved in self.files.items():
            try:
                found = File.of(folder / name)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise DamagedError(f"file {name} is missing") from None
            if found.size != saved.size:
                raise DamagedError(f"file {name} has {found.size} bytes, not {saved.size}")
            if found.crc32 != saved.crc32:
                raise DamagedError(f"file {name} was altered")


def library_versions() -> dict[str, str]:
    return {"python": python_version(), **{name: version(name) for name in _LIBRARIES}}


def files_in(folder: Path) -> dict[str, File]:
    return {str(path.relative_to(folder)): File.of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def sync_tree(folder: Path) -> None:
    """Makes every file and folder below `folder` durable against a loss of power."""
    for path in folder.rglob("*"):
        sync_folder(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
