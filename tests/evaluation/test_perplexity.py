"""Perplexity by corpus and position against the plain forward; texts from files, with a line for each that is none."""

import gzip
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_evaluation import BOS, EOS, TOKENIZER, log_probs_alone, scorer, trained_model

from lightning_jax.errors import UserError
from lightning_jax.evaluation import Scorer, perplexity, read_texts
from lightning_jax.evaluation.scoring import start_ids
from lightning_jax.input_pipeline import TokenizerConfig
from lightning_jax.input_pipeline.tokenizers import ByteTokenizer

TEXTS = ["alpha beta gamma", "ü", "one two three four five six seven eight nine ten"]


def test_every_byte_of_short_documents_is_scored_once():
    result = perplexity(scorer(), TEXTS, context_length=64, stride=64, layout="documents")
    log_probs = [log_probs_alone([BOS, *text.encode()], 1)[0] for text in TEXTS]
    nats = -sum(each.sum(dtype=np.float64) for each in log_probs)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (result["documents"], result["tokens"], result["bytes"]) == (3, size, size)
    assert result["nats_per_token"] == pytest.approx(nats / size, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-6)


def test_positions_are_the_tokens_seen_before():
    result = perplexity(scorer(), TEXTS, context_length=64, stride=64, layout="documents")
    log_probs = [log_probs_alone([BOS, *text.encode()], 1)[0] for text in TEXTS]
    assert [(each["from"], each["to"]) for each in result["by_position"]] == [
        (2**n, 2 ** (n + 1) - 1) for n in range(6)
    ]
    assert sum(each["tokens"] for each in result["by_position"]) == result["tokens"]
    for bucket in result["by_position"]:
        inside = np.concatenate([each[bucket["from"] - 1 : bucket["to"]] for each in log_probs])
        assert bucket["tokens"] == len(inside)
        assert bucket["nats_per_token"] == pytest.approx(-inside.mean(), rel=1e-5)


@pytest.mark.parametrize("stride", [16, 5])
def test_long_documents_are_scored_in_windows_that_go_on_by_the_stride(stride):
    ids = [BOS, *TEXTS[2].encode()]
    nats, done = 0.0, 1
    while done < len(ids):
        end = min(len(ids), done + (16 if done == 1 else stride))
        begin = max(end - 17, 0)
        nats -= log_probs_alone(ids[begin:end], done - begin)[0].sum(dtype=np.float64)
        done = end
    result = perplexity(scorer(), TEXTS[2:], context_length=16, stride=stride, layout="documents")
    assert result["nats_per_token"] * result["tokens"] == pytest.approx(nats, rel=1e-6)
    assert max(each["from"] for each in result["by_position"]) == 16


def test_in_windows_all_documents_are_one_sequence():
    result = perplexity(scorer(), TEXTS, context_length=100, stride=50, layout="windows")
    ids = [token for text in TEXTS for token in (BOS, *text.encode(), EOS)]
    nats = -log_probs_alone(ids, 1)[0].sum(dtype=np.float64)
    assert result["tokens"] == len(ids) - 1
    assert result["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)


def test_texts_begin_with_bos_or_else_eos_or_else_nothing():
    both = SimpleNamespace(bos_id=1, eos_id=2)
    only_eos = SimpleNamespace(bos_id=None, eos_id=2)
    neither = SimpleNamespace(bos_id=None, eos_id=None)
    assert [start_ids(each).tolist() for each in (both, only_eos, neither)] == [[1], [2], []]
    assert start_ids(TOKENIZER).tolist() == [BOS]


def test_texts_are_read_from_json_lines_and_plain_files(tmp_path):
    lines = "\n".join(json.dumps({"text": f"text {n}", "body": f"body {n}"}) for n in range(3)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(lines)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "d.txt").write_text("one\ntwo\n")
    assert read_texts(tmp_path / "a.jsonl", None) == ["text 0", "text 1", "text 2"]
    assert read_texts(tmp_path / "b.json", "body") == ["body 0", "body 1", "body 2"]
    assert read_texts(tmp_path / "c.jsonl.gz", None) == ["text 0", "text 1", "text 2"]
    assert read_texts(tmp_path / "d.txt", None) == ["one\ntwo\n"]


def test_each_record_without_text_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\nnot json\n' + '{"text": 1}\n' * 5)
    with pytest.raises(UserError) as error:
        read_texts(path, "text")
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{path}:2: missing field: no field 'text'; did you mean 'txt'?")
    assert lines[1].startswith(f"{path}:3: malformed: ")
    assert lines[2].startswith(f"{path}:4: wrong type: ")
    assert lines[-1] == f"{path}: 2 more records like these"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("none.txt", None, "No such file"), ("empty.jsonl", b"\n", "holds no text"), ("bad.txt", b"\xff", "not UTF-8")],
)
def test_a_file_without_text_is_a_mistake_of_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / name, None)


def test_without_bos_and_eos_a_single_token_is_nothing_to_predict():
    tokenizer = ByteTokenizer(TokenizerConfig(kind="bytes", path="", vocab_size=256, bos="", eos=""))
    with pytest.raises(UserError, match="nothing to predict"):
        perplexity(Scorer(trained_model(tokenizer=tokenizer)), ["a"], context_length=8, stride=8, layout="documents")
