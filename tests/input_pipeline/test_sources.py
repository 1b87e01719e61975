"""Where documents come from: files found, splits picked, bad records counted or fatal, mistakes in one line."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_jax.input_pipeline import sources
from lightning_jax.input_pipeline.config import CorpusConfig
from lightning_jax.input_pipeline.errors import BadRecordError, SourceError
from lightning_jax.input_pipeline.sources import RecordReport, open_source, read_documents

LIMIT = 1000


def corpus(kind, path, split="", field="", content="text", turns="all"):
    return CorpusConfig(format=kind, path=str(path), split=split, field=field, content="text", turns="all")


def read(config, on_bad_record="skip"):
    source, report = open_source("web", config, LIMIT), RecordReport()
    documents = [
        document.data.decode()
        for part in source.parts
        for document in read_documents(source.read(part), report, on_bad_record=on_bad_record, max_document_bytes=LIMIT)
    ]
    return documents, report


def problem(config):
    with pytest.raises(SourceError) as error:
        read(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folder_gives_its_files_in_order_without_hidden_ones(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.txt", ".git/config", ".hidden", "a/.swp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(corpus("text", tmp_path))[0] == ["a/b.txt", "a/z.md", "b.txt"]


def test_glob_and_single_file(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "odd[1].txt"):
        (tmp_path / name).write_text(name)
    assert read(corpus("text", tmp_path / "*.txt"))[0] == ["a.txt", "b.txt", "odd[1].txt"]
    assert read(corpus("text", tmp_path / "**/*.md"))[0] == ["c.md"]
    assert read(corpus("text", tmp_path / "odd[1].txt"))[0] == ["odd[1].txt"]


def test_folder_of_shards_leaves_other_files_alone(tmp_path):
    for name in ("x-00001-of-00002.jsonl", "x-00000-of-00002.jsonl", "x.jsonl-00002-of-00003", "README.md"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    documents, _ = read(corpus("jsonl", tmp_path, field="text"))
    assert documents == ["x-00000-of-00002.jsonl", "x-00001-of-00002.jsonl", "x.jsonl-00002-of-00003"]


def test_parts_keep_the_order_and_depend_on_sizes_only(tmp_path, monkeypatch):
    for index in range(10):
        (tmp_path / f"{index}.txt").write_text(str(index) * 30)
    whole, _ = read(corpus("text", tmp_path))
    monkeypatch.setattr(sources, "_PART_BYTES", 70)
    assert [len(part) for part in open_source("web", corpus("text", tmp_path), LIMIT).parts] == [2] * 5
    assert read(corpus("text", tmp_path))[0] == whole


def test_fingerprint_changes_with_the_files_only(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = open_source("web", corpus("text", tmp_path), LIMIT).fingerprint
    assert open_source("other", corpus("text", tmp_path), LIMIT).fingerprint == before
    (tmp_path / "a.txt").write_text("ab")
    assert open_source("web", corpus("text", tmp_path), LIMIT).fingerprint != before


def test_bad_records_are_counted_by_reason_with_examples(tmp_path):
    lines = ['{"text": "good"}', '{"text": " \\n"}', '{"text": "\\ud800"}', '{"text": "a\\u0000"}', "{"]
    lines += [json.dumps({"text": "x" * (LIMIT + 1)}), json.dumps({"text": "ä" * (LIMIT // 2)})] + ["{"] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    documents, report = read(corpus("jsonl", tmp_path, field="text"))
    assert documents == ["good", "ä" * (LIMIT // 2)]
    assert report.documents == 2
    assert report.skipped == {"empty": 1, "not UTF-8": 1, "binary": 1, "too long": 1, "malformed": 4}
    assert [example.partition(": ")[0] for example in report.examples] == [
        f"{tmp_path}/a.jsonl:{i}" for i in range(2, 7)
    ]
    assert str(report) == (
        "skipped 8 of 10 records (4 malformed, 1 empty, 1 not UTF-8, 1 binary, 1 too long), "
        f"first {tmp_path}/a.jsonl:2: empty"
    )


def test_bad_record_can_be_fatal(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    with pytest.raises(BadRecordError, match=r"a\.jsonl:2: wrong type: 'text' is a int, not text; mend it, or"):
        read(corpus("jsonl", tmp_path, field="text"), on_bad_record="stop")


def test_report_survives_json_and_adds_up():
    first, second = RecordReport(), RecordReport(documents=3)
    first.skip("a:1", sources.Problem("empty"))
    second.skip("b:1", sources.Problem("empty"))
    total = RecordReport.from_json(json.loads(json.dumps(first.to_json())))
    total.add(second)
    assert (total.documents, total.skipped, total.examples) == (3, {"empty": 2}, ["a:1: empty", "b:1: empty"])


def test_wrong_field_is_a_mistake_not_a_hundred_thousand_bad_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "good"}\n' * 1000)
    assert problem(corpus("jsonl", tmp_path, field="contents")) == (
        "none of the first 100 records is a document, first "
        f"{tmp_path}/a.jsonl:1: missing field: no field 'contents'; did you mean 'content'?"
    )


def test_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "corpus").mkdir()
    assert problem(corpus("text", tmp_path / "corpsu/a/b")) == (
        f"data.corpora.web: {tmp_path}/corpsu/a/b: no such file or folder; did you mean 'corpus'?"
    )


def test_empty_folder_and_glob_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert "the folder holds no file ending in .parquet (and 1 others)" in problem(
        corpus("parquet", tmp_path, field="t")
    )
    assert "no file matches" in problem(corpus("text", tmp_path / "*.md"))


def save_to_disk(folder, shards):
    """The layout that `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{index:05d}-of-{len(shards):05d}.arrow" for index in range(len(shards))]
    for name, column in zip(names, shards, strict=True):
        table = pa.table({"text": column})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_huggingface_dataset_and_its_splits(tmp_path):
    save_to_disk(tmp_path / "one", [["a", "b"], ["c"]])
    assert read(corpus("huggingface", tmp_path / "one", field="text"))[0] == ["a", "b", "c"]
    save_to_disk(tmp_path / "dict" / "train", [["a"]])
    save_to_disk(tmp_path / "dict" / "test", [["b"]])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(corpus("huggingface", tmp_path / "dict", "test", "text"))[0] == ["b"]
    assert "no split 'tain'; did you mean 'train'?" in problem(corpus("huggingface", tmp_path / "dict", "tain", "text"))
    assert "has no splits" in problem(corpus("huggingface", tmp_path / "one", "train", "text"))
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow: missing" in problem(corpus("huggingface", tmp_path / "one", field="text"))


def test_parquet_folder(tmp_path):
    for index in range(2):
        pq.write_table(pa.table({"text": [f"{index}-{row}" for row in range(300)]}), tmp_path / f"{index}.parquet")
    assert read(corpus("parquet", tmp_path, field="text"))[0] == [f"{i}-{row}" for i in range(2) for row in range(300)]


@pytest.fixture(scope="module")
def prepared_tfds(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index in range(20):
                yield index, {"text": f"document {index}", "id": index}

    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyText(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


@pytest.mark.slow
def test_tfds_data_set(prepared_tfds, monkeypatch):
    documents, report = read(corpus("tfds", prepared_tfds, "train", "text"))
    assert sorted(documents) == sorted(f"document {index}" for index in range(20))
    assert report.documents == 20
    assert read(corpus("tfds", prepared_tfds, "train[:5]", "text"))[0] == documents[:5]
    monkeypatch.setattr(sources, "_PART_RECORDS", 7)
    assert read(corpus("tfds", prepared_tfds, "train", "text"))[0] == documents
    assert "no feature 'txt'; did you mean 'text'?" in problem(corpus("tfds", prepared_tfds, "train", "txt"))
    assert "no split 'tran'; did you mean 'train'?" in problem(corpus("tfds", prepared_tfds, "tran", "text"))


@pytest.mark.slow
def test_tfds_mistakes_are_found_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert "no data set 'wikipedai'; did you mean 'wikipedia'?" in problem(corpus("tfds", "wikipedai", "train", "text"))
    assert "not prepared in" in problem(corpus("tfds", "gsm8k", "train", "question"))
    assert "tfds.builder('gsm8k').download_and_prepare" in problem(corpus("tfds", "gsm8k", "train", "question"))
    assert problem(corpus("tfds", "gsm8k:99.0.0", "train", "question"))
    assert problem(corpus("tfds", tmp_path, "train", "question"))
