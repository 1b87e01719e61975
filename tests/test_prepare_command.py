"""The command that prepares data ahead of training."""

import json

import pytest

from lightning_jax.input_pipeline import TokenStore
from lightning_jax.prepare import main


@pytest.fixture
def arguments(tmp_path):
    for name in ("text", "code"):
        lines = [json.dumps({"body": f"document {index} of {name}, in words"}) for index in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    overrides = [
        f"--config.data.corpora.{name}.{field}={value}"
        for name in ("text", "code")
        for field, value in {"format": "jsonl", "path": tmp_path / f"{name}.jsonl", "field": "body"}.items()
    ]
    return ["--config=configs/minimax_m1.py:laptop", f"--config.data.cache_dir={tmp_path / 'cache'}", *overrides]


def test_command_prepares_the_chosen_corpora_and_says_where(arguments, capsys):
    assert main([*arguments, "--corpora=text"]) == 0
    first, folder = capsys.readouterr().out.splitlines()
    assert first.startswith("corpus text: ")
    assert first.endswith("100 records, none skipped")
    stores = [TokenStore.open(f"{folder.strip()}/{split}") for split in ("train", "validation")]
    assert sum(len(store) for store in stores) == 100


def test_unknown_corpus_is_a_mistake_of_one_line(arguments, capsys):
    assert main([*arguments, "--corpora=txt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --corpora: no corpus 'txt'")
    assert "text" in line


def test_wrong_field_is_a_mistake_of_one_line(arguments, capsys):
    assert main([*arguments, "--config.data.corpora.code.field=text"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.corpora.code: none of the first 100 records is a document")
    assert "no field 'text'" in line
