"""The manifest of a checkpoint: what was saved, file by file and leaf by leaf; the last file written."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
FORMAT = 1


class CheckpointError(ValueError):
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
class Manifest:
    step: int
    saved_at: str  # UTC, ISO 8601
    versions: dict[str, str]  # of the libraries that wrote it
    leaves: dict[str, Leaf]  # by path in the state
    files: dict[str, int]  # size in bytes by path in the checkpoint's folder
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
        return cls(leaves=leaves, **body)

    def check_files(self, folder: Path) -> None:
        """Raises DamagedError where a file is missing or has another size."""
        for name, size in self.files.items():
            try:
                found = (folder / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                raise DamagedError(f"file {name} is missing") from None
            if found != size:
                raise DamagedError(f"file {name} has {found} bytes, not {size}")


def file_sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


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
