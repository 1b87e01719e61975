"""How the records of each file format are read: one function per format, from a file to (location, text) pairs.

A record that gives no text gives a `Problem` instead, so that nothing is lost without a reason and a place. What
damages the rest of a file (a truncated .gz, a checksum that fails) ends that file with a `Problem`.
"""

import contextlib
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal

from lightning_jax.input_pipeline.errors import SourceError

Reason = Literal[
    "empty",
    "too long",
    "binary",
    "not UTF-8",
    "malformed",
    "missing field",
    "wrong type",
    "damaged file",
    "refused by the chat template",
    "nothing to train on",
    "nothing to answer",
    "no pair",
]


@dataclass(frozen=True)
class Problem:
    """Why a record gives no text."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


Record = tuple[str, str | Problem]  # location, text
_ROWS = 256  # of a columnar file, held in memory at a time


def nearest(name: str, names: Collection[str]) -> str:
    """A hint at the name that was meant, for the end of an error message."""
    if close := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(sorted(names)[:20])}" if names else "; there are none"


def read_text(path: Path, field: str, max_bytes: int) -> Iterator[Record]:
    """A text file is one document."""
    if (size := path.stat().st_size) > max_bytes:
        yield str(path), Problem("too long", f"{size:,} bytes")
    else:
        yield str(path), decode(path.read_bytes())


def read_jsonl(path: Path, field: str, max_bytes: int) -> Iterator[Record]:
    """A line is a JSON object (or, with field "", a JSON string), plain or in .gz or .zst."""
    for location, record in read_json_records(path, max_bytes):
        yield location, _text_of(record, field)


def read_json_records(path: Path, max_bytes: int) -> Iterator[tuple[str, Any]]:
    """What each line of JSON says, a `Problem` where it says nothing."""
    # Escapes write a byte of text as at most six of JSON; a longer line is not worth holding.
    limit = 6 * max_bytes + 2**20
    number = 0
    try:
        with _open_compressed(path) as file:
            while line := file.readline(limit):
                number += 1
                location = f"{path}:{number}"
                if len(line) == limit and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(limit)
                    yield location, Problem("too long", f"a line of more than {limit:,} bytes")
                else:
                    yield location, decode_json(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        yield f"{path}:{number + 1}", Problem("damaged file", f"{error}; the rest of the file is lost")


def read_array_record(path: Path, field: str, max_bytes: int) -> Iterator[Record]:
    """A record is UTF-8 text, or with a field a JSON object."""
    from array_record.python.array_record_module import ArrayRecordReader

    parse = (lambda data: from_json(data, field)) if field else decode
    try:
        with contextlib.closing(ArrayRecordReader(str(path))) as reader:
            # A damaged file opens as one without records; closing it raises what is wrong.
            count = reader.num_records()
            for start in range(0, count, _ROWS):
                for index, data in enumerate(reader.read(start, min(start + _ROWS, count)), start):
                    yield f"{path}:{index + 1}", parse(data)
    except (ValueError, IndexError, RuntimeError, OSError) as error:
        yield str(path), Problem("damaged file", f"{_first_line(error)}; the rest of the file is lost")


def read_parquet(path: Path, field: str, max_bytes: int) -> Iterator[Record]:
    """A row's column `field` is the text; pages are checked where the file has checksums."""
    for location, row in read_parquet_records(path, (field,)):
        yield location, _text_of(row, field)


def read_parquet_records(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Each row as an object with those of `fields` that the file has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def batches(stack: contextlib.ExitStack, columns: Collection[str]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        file = stack.enter_context(pq.ParquetFile(path, page_checksum_verification=True))
        wanted = [name for name in file.schema_arrow.names if name in columns]
        return file.schema_arrow, file.iter_batches(batch_size=_ROWS, columns=wanted)

    return _read_columns(path, fields, batches)


def read_arrow(path: Path, field: str, max_bytes: int) -> Iterator[Record]:
    """A row's column `field` is the text; an Arrow stream as Hugging Face datasets saves it."""
    import pyarrow as pa

    def batches(stack: contextlib.ExitStack, columns: Collection[str]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        reader = stack.enter_context(pa.ipc.open_stream(stack.enter_context(pa.memory_map(str(path)))))
        return reader.schema, iter(reader)

    for location, row in _read_columns(path, (field,), batches):
        yield location, _text_of(row, field)


def decode(data: bytes) -> str | Problem:
    """The text in UTF-8 `data`."""
    if b"\0" in data:
        return Problem("binary", f"a NUL byte at {data.index(0):,}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Problem("not UTF-8", f"{error.reason} at byte {error.start:,}")


def from_json(data: bytes, field: str) -> str | Problem:
    """The text in a JSON record."""
    return _text_of(decode_json(data), field)


def decode_json(data: bytes) -> Any:
    """What a line of JSON says, or the `Problem` with it."""
    text = decode(data)
    if isinstance(text, Problem):
        return text
    if not text.strip():
        return Problem("empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return Problem("malformed", f"{error.msg} at character {error.pos + 1:,}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        return Problem("malformed", _first_line(error))


def _text_of(record: Any, field: str) -> str | Problem:
    if isinstance(record, Problem):
        return record
    return from_value(record, field) if field == "" else from_record(record, field)


def from_record(record: Any, field: str) -> str | Problem:
    """The text in the field of a decoded record."""
    if not isinstance(record, dict):
        return Problem("wrong type", f"the record is a {type(record).__name__}, not an object with fields")
    if field not in record:
        return Problem("missing field", f"no field {field!r}{nearest(field, record)}")
    return from_value(record[field], field)


def from_value(value: Any, field: str) -> str | Problem:
    """The text that a field's decoded value is."""
    if isinstance(value, bytes):
        return decode(value)
    if not isinstance(value, str):
        return Problem("wrong type", f"{repr(field) if field else 'the record'} is a {type(value).__name__}, not text")
    return value


@contextlib.contextmanager
def _open_compressed(path: Path) -> Iterator[BinaryIO]:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            yield file
    elif path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise SourceError(f"{path}: .zst files need zstandard: pip install zstandard") from None
        with path.open("rb") as file, io.BufferedReader(_ZstdReader(file, zstandard)) as buffered:
            yield buffered
    else:
        with path.open("rb") as file:
            yield file


class _ZstdReader(io.RawIOBase):
    """Decompresses frame after frame; zstandard's own reader takes a file that ends inside a frame for whole."""

    def __init__(self, file: BinaryIO, zstandard: ModuleType):
        self._file, self._zstandard = file, zstandard
        self._frame = None
        self._compressed = self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._text:
            self._compressed = self._compressed or self._file.read(2**16)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._text = self._frame.decompress(self._compressed)
            except self._zstandard.ZstdError as error:
                raise OSError(error) from None
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count


def _read_columns(path: Path, fields: Collection[str], batches: Callable) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    row = 0
    try:
        with contextlib.ExitStack() as stack:
            schema, iterator = batches(stack, fields)
            if not set(fields) & set(schema.names):
                wanted = " or ".join(map(repr, fields))
                yield (
                    str(path),
                    Problem("missing field", f"no column {wanted}{nearest(next(iter(fields)), schema.names)}"),
                )
                return
            for batch in iterator:
                columns = {name: batch.column(name) for name in fields if name in schema.names}
                for index in range(len(batch)):
                    row += 1
                    try:
                        record = {name: column[index].as_py() for name, column in columns.items()}
                        yield f"{path}:{row}", record
                    except UnicodeDecodeError as error:
                        yield f"{path}:{row}", Problem("not UTF-8", f"{error.reason} at byte {error.start:,}")
    except (pa.ArrowInvalid, OSError) as error:
        yield f"{path}:{row + 1}", Problem("damaged file", f"{_first_line(error)}; the rest of the file is lost")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(". ")
