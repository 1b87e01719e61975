"""Documents in memory, with what packing needs of a token store."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class MemoryStore:
    """Stands in for a token store; `folder` receives what is cached next to it."""

    folder: Path
    tokens: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray | None = None
    document_values: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokens.tobytes() + self.offsets.tobytes()).hexdigest()


def memory_store(folder: Path, lengths, first_token: int = 1) -> MemoryStore:
    """Documents of the given lengths whose tokens are all different: first_token, first_token + 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
    return MemoryStore(folder, np.arange(first_token, first_token + offsets[-1], dtype=np.uint32), offsets)
