"""Token stores: the tokenized documents of one corpus on disk, memory-mapped, whole or not there at all.

Little-endian:

    tokens.bin     every document's token ids one after the other, uint16 where the vocabulary fits, else uint32
    offsets.bin    int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
    trained.bin    of chats: a byte for each token, 1 where it is trained, else 0
    margins.bin    of preferences: float32 [documents]
    manifest.json  counts, sizes and SHA-256 of the others, the tokenizer's fingerprint, and what the source was

A store is a folder of its files, of which chats and preferences have more than text has. A preference is two documents,
the chosen chat and then the rejected one.

The manifest is written last, into a folder that gets its name only then: a killed writer leaves no store behind.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from lightning_jax.input_pipeline.errors import TokenStoreError

FORMAT_VERSION = 1
TRAINED, MARGINS = "trained.bin", "margins.bin"
_ALWAYS = ("tokens.bin", "offsets.bin")
_DATA_FILES = (*_ALWAYS, TRAINED, MARGINS)
_OFFSET_DTYPE = np.dtype("<i8")
_VALUE_DTYPE = np.dtype("<f4")
_BLOCK_BYTES = 16 * 2**20


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype, uint16 or uint32, that holds every id below `vocab_size`."""
    if not 0 < vocab_size <= 2**32:
        raise ValueError(f"vocab_size: {vocab_size} is not between 1 and 2**32")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says about its store."""

    format_version: int
    dtype: str
    vocab_size: int
    num_documents: int
    num_tokens: int
    largest_token: int  # -1 in a store without tokens
    sha256: dict[str, str]  # by file name
    tokenizer: str  # fingerprint of the tokenizer
    source: dict[str, Any]  # fingerprint, description, and which records were skipped and why


class TokenStore:
    """A finished store, read through a memory map; cheap to open and safe to share between threads.

    Attributes:
      tokens: uint16 or uint32 [num_tokens], every document one after the other.
      offsets: int64 [documents + 1].
      trained: bool [num_tokens], which tokens are trained; None for text, where all are.
      document_values: numbers that each document has, float32 [documents] by name: "margin" of preferences.
      manifest: what was written about it.
      folder: where it is.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        tokens: np.ndarray,
        offsets: np.ndarray,
        trained: np.ndarray | None,
        document_values: dict[str, np.ndarray],
    ):
        self.folder, self.manifest, self.tokens, self.offsets = folder, manifest, tokens, offsets
        self.trained, self.document_values = trained, document_values

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Self:
        """Opens the store in `folder`, checking the manifest, the file sizes and the offsets (not every token).

        Raises:
          TokenStoreError: something is missing, truncated or inconsistent; one line naming the file.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder / "manifest.json")
        tokens = _map(folder / "tokens.bin", np.dtype(manifest.dtype), manifest.num_tokens)
        offsets = _map(folder / "offsets.bin", _OFFSET_DTYPE, manifest.num_documents + 1)
        if offsets[0] != 0 or offsets[-1] != manifest.num_tokens or np.any(offsets[1:] < offsets[:-1]):
            raise TokenStoreError(
                f"{folder / 'offsets.bin'}: damaged: offsets do not rise from 0 to {manifest.num_tokens:,}; {_REMEDY}"
            )
        trained, values = None, {}
        if TRAINED in manifest.sha256:
            trained = _map(folder / TRAINED, np.dtype(bool), manifest.num_tokens)
        if MARGINS in manifest.sha256:
            values["margin"] = _map(folder / MARGINS, _VALUE_DTYPE, manifest.num_documents)
        return cls(folder, manifest, tokens, offsets, trained, values)

    def __len__(self) -> int:
        return self.manifest.num_documents

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def fingerprint(self) -> str:
        """Identifies the content: equal on every machine that holds the same tokens in the same documents."""
        return hashlib.sha256("".join(self.manifest.sha256[name] for name in self._files).encode()).hexdigest()

    @property
    def _files(self) -> list[str]:
        return [name for name in _DATA_FILES if name in self.manifest.sha256]

    def document(self, index: int) -> np.ndarray:
        """The token ids of document `index` (a view of the map, in the store's dtype)."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder}: no document {index}; the store holds {len(self):,}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def verify(self) -> None:
        """Reads the whole store and compares it with the manifest's checksums.

        Raises:
          TokenStoreError: a file's bytes are not those that were written.
        """
        for name in self._files:
            with open(self.folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.manifest.sha256[name]:
                raise TokenStoreError(
                    f"{self.folder / name}: damaged: SHA-256 {found[:12]}…, the manifest says "
                    f"{self.manifest.sha256[name][:12]}…; {_REMEDY}"
                )


class TokenStoreWriter:
    """Writes a store beside `folder` and gives it its name when the `with` block ends without an exception.

    An existing store in `folder` is replaced then, and left alone when the block fails.

    Args:
      folder: where the store shall be.
      vocab_size: ids must be below; decides the dtype.
      tokenizer: the tokenizer's fingerprint.
      more: TRAINED and MARGINS, where documents come with those.
    """

    def __init__(self, folder: str | os.PathLike, *, vocab_size: int, tokenizer: str = "", more: Collection[str] = ()):
        self.folder = Path(folder)
        self.files = (*_ALWAYS, *more)
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.source: Mapping[str, Any] = {}
        self.num_documents = 0
        self.num_tokens = 0
        self._dtype = token_dtype(vocab_size)
        self._largest = -1
        self._partial = self.folder.with_name(f"{self.folder.name}.partial-{os.getpid()}")

    def __enter__(self) -> Self:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files = {name: _HashedFile(self._partial / name) for name in self.files}
        self._files["offsets.bin"].write(np.zeros(1, _OFFSET_DTYPE))
        return self

    def append(self, ids: np.ndarray | list[int]) -> None:
        """Appends one document: its token ids, [tokens]."""
        self.append_documents(np.asarray(ids), np.array([len(ids)]))

    def append_documents(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        trained: np.ndarray | None = None,
        margins: np.ndarray | None = None,
    ) -> None:
        """Appends documents given one after the other in `tokens` [tokens], with their `lengths` [documents].

        Args:
          trained: bool [tokens], where the store has it.
          margins: [documents], where the store has it.
        """
        if lengths.sum() != len(tokens):
            raise ValueError(f"{self.folder}: lengths add up to {lengths.sum()}, there are {len(tokens)} tokens")
        given = {TRAINED: (trained, len(tokens)), MARGINS: (margins, len(lengths))}
        for name, (values, size) in given.items():
            if (values is not None) != (name in self.files) or (values is not None and len(values) != size):
                raise ValueError(f"{self.folder}: {name} needs {size} values if the store has it, and none if not")
        if len(tokens):
            smallest, largest = int(tokens.min()), int(tokens.max())
            if smallest < 0 or largest >= self.vocab_size:
                wrong = smallest if smallest < 0 else largest
                raise ValueError(f"{self.folder}: token id {wrong} is outside the vocabulary of {self.vocab_size:,}")
            self._largest = max(self._largest, largest)
        ends = self.num_tokens + np.cumsum(lengths, dtype=_OFFSET_DTYPE)
        self._files["tokens.bin"].write(tokens.astype(self._dtype))
        self._files["offsets.bin"].write(ends)
        if trained is not None:
            self._files[TRAINED].write(trained.astype(bool))
        if margins is not None:
            self._files[MARGINS].write(margins.astype(_VALUE_DTYPE))
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def append_store(self, store: TokenStore) -> None:
        """Appends every document of `store`, in blocks: memory does not grow with its size."""
        for first, last in _document_blocks(store.offsets, _BLOCK_BYTES // self._dtype.itemsize):
            begin, end = store.offsets[first], store.offsets[last]
            self.append_documents(
                store.tokens[begin:end],
                np.diff(store.offsets[first : last + 1]),
                None if store.trained is None else store.trained[begin:end],
                store.document_values["margin"][first:last] if "margin" in store.document_values else None,
            )

    def __exit__(self, exception_type, exception, traceback) -> None:
        digests = {name: file.close() for name, file in self._files.items()}
        if exception_type is not None:
            shutil.rmtree(self._partial)
            return
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype=self._dtype.str,
            vocab_size=self.vocab_size,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            largest_token=self._largest,
            sha256=digests,
            tokenizer=self.tokenizer,
            source=dict(self.source),
        )
        with open(self._partial / "manifest.json", "w", encoding="utf-8") as file:
            json.dump(asdict(manifest), file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(self.folder, ignore_errors=True)
        self._partial.rename(self.folder)


class _HashedFile:
    """A file being written, with the running SHA-256 of what went in."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).data
        self._file.write(data)
        self._sha256.update(data)

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()


_REMEDY = "delete the folder and prepare the corpus again"


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TokenStoreError(f"{path}: missing: this folder holds no finished token store") from None
    except ValueError as error:
        raise TokenStoreError(f"{path}: damaged: {error}; {_REMEDY}") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise TokenStoreError(f"{path}: not a token store of format version {FORMAT_VERSION}; {_REMEDY}")
    names = {field.name for field in fields(Manifest)}
    if content.keys() != names:
        wrong = ", ".join(sorted(content.keys() ^ names))
        raise TokenStoreError(f"{path}: damaged: missing or unknown entries {wrong}; {_REMEDY}")
    manifest = Manifest(**content)
    counts = (manifest.num_documents, manifest.num_tokens)
    if manifest.dtype not in ("<u2", "<u4") or any(type(count) is not int or count < 0 for count in counts):
        raise TokenStoreError(f"{path}: damaged: dtype or counts make no sense; {_REMEDY}")
    return manifest


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise TokenStoreError(f"{path}: missing; {_REMEDY}") from None
    if size != length * dtype.itemsize:
        raise TokenStoreError(f"{path}: {size:,} bytes, the manifest says {length * dtype.itemsize:,}; {_REMEDY}")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r").view(np.ndarray) if length else np.empty(0, dtype)


def _document_blocks(offsets: np.ndarray, tokens_per_block: int) -> Iterable[tuple[int, int]]:
    """Ranges of whole documents, each of about `tokens_per_block` tokens and at least one document."""
    first, documents = 0, len(offsets) - 1
    while first < documents:
        last = int(np.searchsorted(offsets, offsets[first] + tokens_per_block, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last
