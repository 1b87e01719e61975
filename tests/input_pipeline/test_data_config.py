"""The data's config: every impossible combination is a line of its own, and a sound config has none."""

import dataclasses

import pytest

from lightning_jax.input_pipeline.config import CorpusConfig, DataConfig, MixtureConfig, TokenizerConfig

JSONL = CorpusConfig("jsonl", "folder", split="", field="text", content="text", turns="all")
TRAIN = TokenizerConfig("train", path="", vocab_size=4096, bos="", eos="</s>")
DATA = DataConfig(
    {"web": JSONL}, TRAIN, "", validation_fraction=0.1, on_bad_record="skip", max_document_bytes=1000, chat_template=""
)
MIXTURE = MixtureConfig({"a": 7.0, "b": 3.0}, {"a": 1.0, "b": 0.0}, packing="split")


@pytest.mark.parametrize(
    "sound",
    [
        JSONL,
        dataclasses.replace(JSONL, field=""),
        CorpusConfig("text", "folder", "", "", "text", "all"),
        CorpusConfig("embedded", "code", "", "", "text", "all"),
        CorpusConfig("parquet", "folder", "", "text", "text", "all"),
        CorpusConfig("tfds", "wiki40b/en:1.3.0", "train", "text", "text", "all"),
        CorpusConfig("huggingface", "folder", "", "text", "text", "all"),
        CorpusConfig("tokens", "folder", "", "", "text", "all"),
        TRAIN,
        TokenizerConfig("bytes", "", 257, "", "</s>"),
        TokenizerConfig("file", "tokenizer.json", 200_064, "", ""),
        DATA,
        MIXTURE,
    ],
)
def test_sound_config_has_no_problems(sound):
    assert sound.problems() == []


@pytest.mark.parametrize(
    ("config", "change", "problem"),
    [
        (JSONL, {"path": ""}, "path: empty; give a file, folder or glob, or the name of a data set"),
        (JSONL, {"split": "train"}, "split: jsonl has no split 'train'; make it \"\""),
        (JSONL, {"format": "text"}, "field: text records have no field 'text'; make it \"\""),
        (JSONL, {"format": "tokens"}, "field: tokens records have no field 'text'; make it \"\""),
        (
            JSONL,
            {"format": "parquet", "field": ""},
            'field: empty; name the column of parquet records that holds the text, often "text"',
        ),
        (JSONL, {"format": "tfds"}, 'split: empty; name one, often "train"'),
        (
            JSONL,
            {"format": "embedded", "field": ""},
            "path: the embedded corpus has no part 'folder'; text or code",
        ),
        (TRAIN, {"kind": "file"}, "path: empty; give a tokenizer.json"),
        (TRAIN, {"path": "a.json"}, 'path: kind="train" reads no file; make it "" or the kind "file"'),
        (TRAIN, {"vocab_size": 256}, "vocab_size: 256 has no room for every byte; make it at least 257"),
        (DATA, {"corpora": {}}, "corpora: empty; name at least one corpus"),
        (DATA, {"validation_fraction": 1.0}, "validation_fraction: 1.0 is not in [0, 1)"),
        (DATA, {"max_document_bytes": 0}, "max_document_bytes: 0 is not positive"),
        (
            DATA,
            {"corpora": {"web": CorpusConfig("tokens", "folder", "", "", "text", "all")}},
            'tokenizer.kind: no corpus holds text to train on; "file" with a tokenizer.json',
        ),
        (MIXTURE, {"start": {"a": -1.0, "b": 2.0}}, "start.a: -1.0 is no share; 0 leaves a corpus out"),
        (MIXTURE, {"end": {"a": 0.0, "b": 0.0}}, "end: no corpus has a share; make one positive"),
        (MIXTURE, {"end": {"a": 1.0}}, "end: does not name the same corpora as start (b); a share may be 0"),
    ],
)
def test_every_impossible_value_is_one_line(config, change, problem):
    assert problem in dataclasses.replace(config, **change).problems()
