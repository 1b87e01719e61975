"""Where a corpus' documents come from: which parts it has, and which records are documents and which are refused.

A source is cut into parts (groups of files, or ranges of records) whose boundaries depend on the source alone, so that
parts can be read by any number of processes and put back in order.
"""

import collections
import functools
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from lightning_jax.input_pipeline.chat_records import FIELDS, Content, chat_document
from lightning_jax.input_pipeline.config import CorpusConfig
from lightning_jax.input_pipeline.embedded import EmbeddedCorpus
from lightning_jax.input_pipeline.errors import BadRecordError, SourceError
from lightning_jax.input_pipeline.generated_tasks import TASKS
from lightning_jax.input_pipeline.readers import (
    Problem,
    Record,
    from_record,
    nearest,
    read_array_record,
    read_arrow,
    read_json_records,
    read_jsonl,
    read_parquet,
    read_parquet_records,
    read_text,
)

_PART_BYTES = 256 * 2**20
_PART_RECORDS = 100_000
_EXAMPLES = 5
_HOPELESS = 100  # this many bad records before the first good one are a mistake in the config


@dataclass
class RecordReport:
    """How many records were documents, how many were skipped for which reason, and the first few of those."""

    documents: int = 0
    skipped: collections.Counter = field(default_factory=collections.Counter)
    examples: list[str] = field(default_factory=list)

    def skip(self, location: str, problem: Problem) -> None:
        self.skipped[problem.reason] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{location}: {problem}")

    def add(self, other: Self) -> None:
        self.documents += other.documents
        self.skipped += other.skipped
        self.examples = (self.examples + other.examples)[:_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        return {"documents": self.documents, "skipped": dict(self.skipped), "examples": self.examples}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        return cls(content["documents"], collections.Counter(content["skipped"]), list(content["examples"]))

    def __str__(self) -> str:
        total = self.documents + self.skipped.total()
        if not self.skipped:
            return f"{total:,} records, none skipped"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
        return f"skipped {self.skipped.total():,} of {total:,} records ({reasons}), first {self.examples[0]}"


class Document(NamedTuple):
    """A record that is a document: UTF-8, or the JSON of a chat."""

    location: str
    data: bytes


@dataclass(frozen=True)
class Source:
    """The records of a corpus, in parts."""

    fingerprint: str  # changes when the records, or where they are cut into parts, may have changed
    parts: Sequence[Any]  # picklable, like `read`
    read: Callable[[Any], Iterator[Record]]  # the records of a part
    describe: Callable[[], str]  # what it is, for people


def open_source(name: str, corpus: CorpusConfig, max_document_bytes: int) -> Source:
    """The source of `corpus`, which the config calls `name`.

    Raises:
      SourceError: there is nothing where the config points, in one line with the nearest existing name.
    """
    try:
        if corpus.format == "embedded":
            return _embedded_source(corpus)
        if corpus.format == "generated":
            return _generated_source(corpus)
        if corpus.format == "tfds":
            return _tfds_source(corpus)
        return _file_source(corpus, max_document_bytes)
    except SourceError as error:
        raise SourceError(f"data.corpora.{name}: {error}") from None


def files_of(corpus: CorpusConfig) -> list[Path]:
    """The files of a corpus in files, in the order in which they are read. Raises SourceError where there is none."""
    return _files(corpus.path, _FILE_FORMATS[corpus.format].endings)


def read_documents(
    records: Iterable[Record],
    report: RecordReport,
    *,
    on_bad_record: Literal["skip", "stop"],
    max_document_bytes: int,
) -> Iterator[Document]:
    """The documents among `records`, counting in `report` what is skipped.

    Raises:
      BadRecordError: the first bad record, with on_bad_record="stop".
      SourceError: the first hundred records are all bad.
    """
    for location, text in records:
        document = text if isinstance(text, Problem) else _check(text, max_document_bytes)
        if isinstance(document, Problem):
            refuse(location, document, report, on_bad_record)
        else:
            report.documents += 1
            yield Document(location, document)


def refuse(location: str, problem: Problem, report: RecordReport, on_bad_record: Literal["skip", "stop"]) -> None:
    """Counts a record that gives no document, or raises as `read_documents` does."""
    if on_bad_record == "stop":
        raise BadRecordError(f"{location}: {problem}; mend it, or let data.on_bad_record='skip' leave it out")
    report.skip(location, problem)
    if report.documents == 0 and report.skipped.total() == _HOPELESS:
        raise SourceError(f"none of the first {_HOPELESS} records is a document, first {report.examples[0]}")


def _check(text: str, max_document_bytes: int) -> bytes | Problem:
    if not text.strip():
        return Problem("empty")
    if "\0" in text:
        return Problem("binary", f"a NUL at character {text.index(chr(0)) + 1:,}")
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Problem("not UTF-8", f"half of a surrogate pair at character {error.start + 1:,}")
    if len(data) > max_document_bytes:
        return Problem("too long", f"{len(data):,} bytes, data.max_document_bytes is {max_document_bytes:,}")
    return data


@dataclass(frozen=True)
class _FileFormat:
    read: Callable[[Path, str, int], Iterator[Record]]
    endings: tuple[str, ...]  # which files of a folder belong to it; () for all


_JSON_ENDINGS = tuple(kind + packed for kind in (".jsonl", ".json", ".ndjson") for packed in ("", ".gz", ".zst"))
_FILE_FORMATS = {
    "text": _FileFormat(read_text, ()),
    "jsonl": _FileFormat(read_jsonl, _JSON_ENDINGS),
    "parquet": _FileFormat(read_parquet, (".parquet",)),
    "array_record": _FileFormat(read_array_record, (".array_record", ".arrayrecord")),
    "huggingface": _FileFormat(read_arrow, (".arrow",)),
}


def _file_source(corpus: CorpusConfig, max_document_bytes: int) -> Source:
    """A corpus in files, read in the order of their paths."""
    if corpus.format == "huggingface":
        files = _huggingface_files(_existing(corpus.path), corpus.split)
    else:
        files = files_of(corpus)
    status = [file.stat() for file in files]
    sizes = [each.st_size for each in status]
    return Source(
        fingerprint=fingerprint(
            [_PART_BYTES]
            + [
                [os.path.abspath(file), each.st_size, each.st_mtime_ns]
                for file, each in zip(files, status, strict=True)
            ]
        ),
        parts=_group(files, sizes),
        read=functools.partial(_read_files, corpus.format, corpus.field, corpus.content, max_document_bytes),
        describe=lambda: f"{corpus.path}, {len(files):,} files, {sum(sizes) / 1e6:,.1f} MB",
    )


def _read_files(
    format_name: str, field: str, content: Content, max_document_bytes: int, part: Sequence[Path]
) -> Iterator[Record]:
    for file in part:
        if content == "text":
            yield from _FILE_FORMATS[format_name].read(file, field, max_document_bytes)
            continue
        if format_name == "jsonl":
            records = read_json_records(file, max_document_bytes)
        else:
            records = read_parquet_records(file, FIELDS[content])
        for location, record in records:
            yield location, chat_document(record, content)


def _embedded_source(corpus: CorpusConfig) -> Source:
    """The corpus every Python installation carries."""
    embedded = EmbeddedCorpus(corpus.path)
    return Source(
        fingerprint=embedded.fingerprint,
        parts=[corpus.path],
        read=lambda part: iter(embedded.documents),
        describe=lambda: embedded.description,
    )


def _generated_source(corpus: CorpusConfig) -> Source:
    """Problems that are made here."""
    task = TASKS[corpus.path]

    def read(part: str) -> Iterator[Record]:
        for number, record in enumerate(task.records[corpus.content](), start=1):
            yield f"{part}:{number}", chat_document(record, corpus.content)

    return Source(
        fingerprint=fingerprint([corpus.path, task.version, task.size]),
        parts=[corpus.path],
        read=read,
        describe=lambda: f"{task.size:,} generated {corpus.path} problems",
    )


def _tfds_source(corpus: CorpusConfig) -> Source:
    """A split of a data set that TensorFlow Datasets has prepared on this machine; needs no TensorFlow."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # registers c4, wikipedia and the like

    try:
        folder = Path(corpus.path).expanduser()
        builder = tfds.builder_from_directory(folder) if folder.is_dir() else tfds.builder(corpus.path)
    except tfds.core.DatasetNotFoundError:
        name = corpus.path.partition("/")[0].partition(":")[0]
        raise SourceError(
            f"no data set {name!r}{nearest(name, tfds.list_builders(with_community_datasets=False))}"
        ) from None
    except (AssertionError, ValueError, OSError) as error:  # no such version or config; a folder of something else
        raise SourceError(f"{corpus.path}: {str(error).partition(chr(10))[0]}") from None
    # Asked for data it lacks, data_source tries the network for minutes before it fails.
    if not builder.is_prepared():
        raise SourceError(
            f"{corpus.path}: not prepared in {builder.data_path}; prepare it with "
            f"tfds.builder({corpus.path!r}).download_and_prepare(file_format='array_record')"
        )
    if builder.info.file_format not in (tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.PARQUET):
        raise SourceError(
            f"{builder.data_path}: prepared as {builder.info.file_format.value}, which needs TensorFlow to read; "
            "prepare it with file_format='array_record'"
        )
    if corpus.field not in builder.info.features:
        raise SourceError(f"no feature {corpus.field!r}{nearest(corpus.field, list(builder.info.features))}")
    if (split := corpus.split.partition("[")[0]) not in builder.info.splits:
        raise SourceError(f"no split {split!r}{nearest(split, list(builder.info.splits))}")
    name = f"{builder.info.full_name}[{corpus.split}]"
    data = builder.as_data_source(split=corpus.split)
    files = sorted(path for path in Path(builder.data_path).iterdir() if path.is_file())
    starts = range(0, len(data), _PART_RECORDS)
    return Source(
        fingerprint=fingerprint(
            [_PART_RECORDS, name, [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]
        ),
        parts=[range(start, min(start + _PART_RECORDS, len(data))) for start in starts],
        read=functools.partial(_read_tfds, data, name, corpus.field),
        describe=lambda: f"{name}, {len(data):,} records",
    )


def _read_tfds(data: Sequence[Any], name: str, field: str, part: range) -> Iterator[Record]:
    for index in part:
        yield f"{name}:{index + 1}", from_record(data[index], field)


def fingerprint(content: Any) -> str:
    """SHA-256 of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        parent = next(folder for folder in path.parents if folder.exists())
        child = path.relative_to(parent).parts[0]
        raise SourceError(f"{path}: no such file or folder{nearest(child, os.listdir(parent))}")
    return path


def _files(name: str, endings: tuple[str, ...]) -> list[Path]:
    """The files that a file name, a folder or a glob stands for."""
    pattern = os.path.expanduser(name)
    if glob.has_magic(pattern) and not os.path.exists(pattern):
        files = [Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        if not files:
            raise SourceError(f"{name}: no file matches")
        return sorted(files)
    path = _existing(name)
    if path.is_file():
        return [path]
    visible = [
        Path(folder, file)
        for folder, _, names in os.walk(path)
        for file in names
        if not any(part.startswith(".") for part in Path(folder, file).relative_to(path).parts)
    ]
    files = [file for file in visible if _belongs(file.name, endings)]
    if not files:
        wanted = f" ending in {' or '.join(endings)}" if endings else ""
        raise SourceError(f"{path}: the folder holds no file{wanted} (and {len(visible):,} others)")
    return sorted(files)


def _belongs(name: str, endings: tuple[str, ...]) -> bool:
    # Shards are called corpus.array_record-00003-of-00128 or corpus-00003-of-00128.parquet.
    return not endings or name.endswith(endings) or any(f"{ending}-" in name for ending in endings)


def _huggingface_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a data set written by `save_to_disk`, in order; `split` picks from a DatasetDict."""
    if (splits_file := folder / "dataset_dict.json").exists():
        splits = json.loads(splits_file.read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise SourceError(f"{folder}: no split {split!r}{nearest(split, splits)}")
        folder = folder / split
    elif split:
        raise SourceError(f"{folder}: has no splits; leave split empty")
    if (state_file := folder / "state.json").exists():
        names = json.loads(state_file.read_text(encoding="utf-8"))["_data_files"]
        files = [folder / entry["filename"] for entry in names]
        for file in files:
            if not file.exists():
                raise SourceError(f"{file}: missing, though state.json lists it")
        return files
    return _files(str(folder), _FILE_FORMATS["huggingface"].endings)


def _group(files: Sequence[Path], sizes: Sequence[int]) -> list[list[Path]]:
    """Consecutive files in groups of about `_PART_BYTES`."""
    groups: list[list[Path]] = []
    room = 0
    for file, size in zip(files, sizes, strict=True):
        if size > room or not groups:
            groups.append([])
            room = _PART_BYTES
        groups[-1].append(file)
        room -= size
    return groups
