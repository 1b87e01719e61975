"""Every format's round trip, and every kind of bad record at its exact place."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lightning_jax.input_pipeline.errors import SourceError
from lightning_jax.input_pipeline.readers import (
    Problem,
    nearest,
    read_array_record,
    read_arrow,
    read_jsonl,
    read_parquet,
    read_text,
)

TEXTS = ["first", "zweitens: Größe", "第三\nline two", "", "🙂 " * 100]
LIMIT = 10_000


def texts(records):
    return [text for _, text in records]


def reasons(records):
    return [(location.rpartition("/")[2], text.reason) for location, text in records if isinstance(text, Problem)]


def zstd(data):
    return pytest.importorskip("zstandard").compress(data)


def write_jsonl(path, lines, compress=lambda data: data):
    path.write_bytes(compress("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")))
    return path


def write_parquet(path, column, **options):
    pq.write_table(pa.table({"id": range(len(column)), "text": column}), path, **options)
    return path


def write_arrow(path, column):
    table = pa.table({"id": range(len(column)), "text": column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("﻿Größe\r\nline two\n".encode())
    assert list(read_text(tmp_path / "a.txt", "", LIMIT)) == [(str(tmp_path / "a.txt"), "Größe\r\nline two\n")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"a\0b", "binary"), (b"\x89PNG\xff", "not UTF-8"), (b"x" * (LIMIT + 1), "too long")],
)
def test_bad_text_file_is_named_with_its_reason(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    assert reasons(read_text(tmp_path / "a.txt", "", LIMIT)) == [("a.txt", reason)]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)],
)
@pytest.mark.parametrize("field", ["text", ""])
def test_jsonl_round_trip(tmp_path, suffix, compress, field):
    lines = [json.dumps({"id": 1, "text": text} if field else text) for text in TEXTS]
    path = write_jsonl(tmp_path / f"a{suffix}", lines, compress)
    assert list(read_jsonl(path, field, LIMIT)) == [(f"{path}:{i}", text) for i, text in enumerate(TEXTS, 1)]


def test_bad_jsonl_records_are_named_by_line(tmp_path):
    lines = [
        '{"text": "good"}',
        "",
        '{"text": "cut off',
        '{"txet": "misspelt"}',
        '{"text": 3}',
        '{"text": null}',
        '["text"]',
        '{"text": "\udcff"}',
        '{"text": "a\0b"}',
        json.dumps({"text": "x" * (8 * LIMIT + 2**20)}),
        "[" * 200_000,
        '{"text": "good again"}',
    ]
    records = list(read_jsonl(write_jsonl(tmp_path / "a.jsonl", lines), "text", LIMIT))
    assert [text for text in texts(records) if isinstance(text, str)] == ["good", "good again"]
    assert reasons(records) == [
        ("a.jsonl:2", "empty"),
        ("a.jsonl:3", "malformed"),
        ("a.jsonl:4", "missing field"),
        ("a.jsonl:5", "wrong type"),
        ("a.jsonl:6", "wrong type"),
        ("a.jsonl:7", "wrong type"),
        ("a.jsonl:8", "not UTF-8"),
        ("a.jsonl:9", "binary"),
        ("a.jsonl:10", "too long"),
        ("a.jsonl:11", "malformed"),
    ]
    assert str(records[3][1]) == "missing field: no field 'text'; did you mean 'txet'?"
    assert str(records[4][1]) == "wrong type: 'text' is a int, not text"


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
def test_compressed_file_cut_anywhere_is_damaged_at_its_line(tmp_path, suffix, compress):
    noise = random.Random(0)
    lines = [json.dumps({"text": noise.randbytes(30).hex()}) for _ in range(300)]
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", lines, compress)
    content = path.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 20):
        path.write_bytes(content[:size])
        *good, (location, problem) = read_jsonl(path, "text", LIMIT)
        assert problem.reason == "damaged file"
        assert location == f"{path}:{len(good) + 1}"
        assert texts(good) == [json.loads(line)["text"] for line in lines[: len(good)]]


def test_zst_of_several_frames_is_read_whole(tmp_path):
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstd(line.encode()) for line in lines))
    assert texts(read_jsonl(tmp_path / "a.jsonl.zst", "text", LIMIT)) == TEXTS


def test_zst_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    path = write_jsonl(tmp_path / "a.jsonl.zst", [])
    with pytest.raises(SourceError, match="pip install zstandard"):
        list(read_jsonl(path, "text", LIMIT))


@pytest.mark.parametrize("name", ["gz", "zst"])
def test_file_that_is_not_what_its_name_says_is_damaged(tmp_path, name):
    path = write_jsonl(tmp_path / f"a.jsonl.{name}", ['{"text": "not compressed"}'])
    assert reasons(read_jsonl(path, "text", LIMIT)) == [(f"{path.name}:1", "damaged file")]


@pytest.mark.parametrize(("write", "read"), [(write_parquet, read_parquet), (write_arrow, read_arrow)])
def test_columns_round_trip(tmp_path, write, read):
    path = write(tmp_path / "a", TEXTS)
    assert list(read(path, "text", LIMIT)) == [(f"{path}:{i}", text) for i, text in enumerate(TEXTS, 1)]


@pytest.mark.parametrize(("write", "read"), [(write_parquet, read_parquet), (write_arrow, read_arrow)])
def test_bad_rows_are_named_by_number(tmp_path, write, read):
    column = pa.array([b"good", None, b"\xff", b"a\0b", b"good"], pa.binary())
    path = write(tmp_path / "a", column)
    expected = [("a:2", "wrong type"), ("a:3", "not UTF-8"), ("a:4", "binary")]
    assert reasons(read(path, "text", LIMIT)) == expected
    unchecked = pa.Array.from_buffers(pa.string(), 5, column.buffers())
    assert reasons(read(write(tmp_path / "a", unchecked), "text", LIMIT))[:2] == expected[:2]


@pytest.mark.parametrize(("write", "read"), [(write_parquet, read_parquet), (write_arrow, read_arrow)])
def test_missing_column_names_the_nearest(tmp_path, write, read):
    path = write(tmp_path / "a", TEXTS)
    assert [(location, str(text)) for location, text in read(path, "texts", LIMIT)] == [
        (str(path), "missing field: no column 'texts'; did you mean 'text'?")
    ]


@pytest.mark.parametrize(("write", "read"), [(write_parquet, read_parquet), (write_arrow, read_arrow)])
def test_truncated_columns_are_damaged(tmp_path, write, read):
    path = write(tmp_path / "a", TEXTS * 100)
    content = path.read_bytes()
    for size in (len(content) // 2, 3, 0):
        path.write_bytes(content[:size])
        assert [reason for _, reason in reasons(read(path, "text", LIMIT))] == ["damaged file"]


def test_flipped_parquet_page_is_damaged_where_it_has_checksums(tmp_path):
    path = write_parquet(tmp_path / "a", ["abcdefgh" * 50], write_page_checksum=True, compression="none")
    content = bytearray(path.read_bytes())
    content[content.index(b"abcdefgh" * 50)] ^= 1
    path.write_bytes(content)
    assert reasons(read_parquet(path, "text", LIMIT)) == [("a:1", "damaged file")]


def test_array_record_round_trip(tmp_path):
    path = write_array_record(tmp_path / "a", [text.encode() for text in TEXTS])
    assert list(read_array_record(path, "", LIMIT)) == [(f"{path}:{i}", text) for i, text in enumerate(TEXTS, 1)]
    path = write_array_record(tmp_path / "b", [json.dumps({"text": text}).encode() for text in TEXTS * 100])
    assert texts(read_array_record(path, "text", LIMIT)) == TEXTS * 100


def test_bad_array_records_are_named_by_number(tmp_path):
    path = write_array_record(tmp_path / "a", [b"good", b"\xff", b"\0"])
    assert reasons(read_array_record(path, "", LIMIT)) == [("a:2", "not UTF-8"), ("a:3", "binary")]


@pytest.mark.parametrize("size", [-100, 70_000, 10, 0])
def test_truncated_array_record_is_damaged(tmp_path, size):
    path = write_array_record(tmp_path / "a", [random.Random(i).randbytes(3000).hex().encode() for i in range(100)])
    path.write_bytes(path.read_bytes()[:size])
    assert [reason for _, reason in reasons(read_array_record(path, "", LIMIT))] == ["damaged file"]


def test_nearest_lists_what_there_is_when_nothing_is_near():
    assert nearest("body", ["text", "id"]) == "; there are id, text"
    assert nearest("body", []) == "; there are none"
