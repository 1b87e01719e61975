"""Tokenizers: lossless, deterministic, and clear about what does not fit."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from lightning_jax.input_pipeline.config import TokenizerConfig
from lightning_jax.input_pipeline.errors import TokenizerError
from lightning_jax.input_pipeline.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    check_vocabulary,
    encode,
    encode_documents,
    train_tokenizer,
)

CORPUS = ["the cat sat on the mat, the cat sat", "def cat(mat):\n    return mat + 1234\n", "Größe 第三 🙂"] * 5
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def config(kind="train", vocab_size=290, bos="", eos="<|endoftext|>"):
    return TokenizerConfig(kind=kind, path="", vocab_size=vocab_size, bos=bos, eos=eos)


TOKENIZERS = {"bytes": ByteTokenizer(config("bytes")), "trained": train_tokenizer(CORPUS, config())}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)
@given(text=UNICODE)
def test_any_text_comes_back(kind, text):
    assert TOKENIZERS[kind].decode(encode(TOKENIZERS[kind], text)) == text


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each tokenizer as Hugging Face's library reads it from its tokenizer.json."""
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"

    def read(tokenizer):
        tokenizer.save(path)
        return Backend.from_file(str(path))

    return {kind: read(tokenizer) for kind, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None)
@given(text=UNICODE, special=st.booleans())
def test_what_is_saved_gives_the_same_ids_and_texts(saved, kind, text, special):
    if special:
        text += "<|endoftext|>" + text
    ids = TOKENIZERS[kind].encode_special(text)
    np.testing.assert_array_equal(saved[kind].encode(text).ids, ids)
    assert saved[kind].decode(list(ids)) == TOKENIZERS[kind].decode(ids)
    assert saved[kind].decode([255, *ids]) == TOKENIZERS[kind].decode([255, *ids])


def test_byte_ids_are_the_bytes():
    tokenizer = ByteTokenizer(config("bytes", bos="<s>"))
    assert encode(tokenizer, "aß").tolist() == [97, 0xC3, 0x9F]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.decode([256, 97, 0xC3, 257]) == "a�"


@pytest.mark.parametrize(("bos", "eos"), [("", ""), ("", "</s>"), ("<s>", "</s>"), ("</s>", "</s>")])
@pytest.mark.parametrize("kind", ["bytes", "train"])
def test_documents_stand_between_bos_and_eos(kind, bos, eos):
    settings_ = config(kind, bos=bos, eos=eos)
    tokenizer = ByteTokenizer(settings_) if kind == "bytes" else train_tokenizer(CORPUS, settings_)
    texts = [b"the cat", b"", b"mat"]
    tokens, lengths = encode_documents(tokenizer, texts)
    documents = [document.tolist() for document in np.split(tokens, np.cumsum(lengths)[:-1])]
    before = [tokenizer.bos_id] if bos else []
    after = [tokenizer.eos_id] if eos else []
    assert documents == [before + encode(tokenizer, text.decode()).tolist() + after for text in texts]
    assert all(0 <= token < tokenizer.vocab_size for document in documents for token in document)
    assert [tokenizer.decode(document) for document in documents] == ["the cat", "", "mat"]


def test_no_documents_give_no_tokens():
    tokens, lengths = encode_documents(TOKENIZERS["bytes"], [])
    assert (len(tokens), len(lengths)) == (0, 0)


def test_what_looks_like_a_special_token_in_a_document_is_text():
    tokenizer = TOKENIZERS["trained"]
    ids = encode(tokenizer, "a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.eos_id not in encode(pickle.loads(pickle.dumps(tokenizer)), "a<|endoftext|>b")


def test_trained_tokenizer_merges_what_is_frequent_and_keeps_digits_single():
    tokenizer = TOKENIZERS["trained"]
    assert tokenizer.vocab_size == 290
    assert len(encode(tokenizer, "the cat sat")) <= 5
    assert [tokenizer.decode([token]) for token in encode(tokenizer, "1234")] == ["1", "2", "3", "4"]


def test_training_does_not_depend_on_the_process_or_its_threads(tmp_path):
    script = (
        "import sys; from lightning_jax.input_pipeline.config import TokenizerConfig\n"
        "from lightning_jax.input_pipeline.tokenizers import train_tokenizer\n"
        "texts = [open(p, encoding='utf-8').read() for p in sys.argv[1:]]\n"
        "print(train_tokenizer(texts, TokenizerConfig('train', '', 1000, '', '</s>')).fingerprint)"
    )
    files = [subprocess.__file__, os.__file__, pickle.__file__]
    found = {
        subprocess.run(
            [sys.executable, "-c", script, *files],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "4")
    }
    assert len(found) == 1


def test_file_tokenizer_equals_the_one_that_was_saved(tmp_path):
    tokenizer = TOKENIZERS["trained"]
    tokenizer.save(tmp_path / "tokenizer.json")
    opened = FileTokenizer.open(tmp_path / "tokenizer.json", bos="", eos="<|endoftext|>")
    assert opened.fingerprint == tokenizer.fingerprint
    assert encode(opened, "the cat").tolist() == encode(tokenizer, "the cat").tolist()
    assert FileTokenizer.open(tmp_path / "tokenizer.json", bos="", eos="").fingerprint != tokenizer.fingerprint


def test_settings_of_a_file_that_cut_pad_or_add_tokens_have_no_effect(tmp_path):
    TOKENIZERS["trained"].save(tmp_path / "plain.json")
    backend = Backend.from_file(str(tmp_path / "plain.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    backend.save(str(tmp_path / "odd.json"))
    tokenizer = FileTokenizer.open(tmp_path / "odd.json", bos="", eos="<|endoftext|>")
    for text in ("mat", "the cat sat on a mat"):
        assert encode(tokenizer, text).tolist() == encode(TOKENIZERS["trained"], text).tolist()


def test_ids_beyond_the_tokenizer_give_no_text():
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode([*encode(tokenizer, "cat"), 200_000]) == "cat"


def test_vocabulary_with_holes_counts_to_its_largest_id():
    backend = Backend(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    assert FileTokenizer(backend.to_str(), "holes", bos="", eos="b").vocab_size == 70_001


@pytest.mark.parametrize("content", ["", "{}", "not json", None])
def test_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TokenizerError, match=r"data\.tokenizer\.path: .*tokenizer\.json") as error:
        FileTokenizer.open(path, bos="", eos="")
    assert "\n" not in str(error.value)


def test_unknown_special_token_names_the_nearest(tmp_path):
    TOKENIZERS["trained"].save(tmp_path / "tokenizer.json")
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.eos: .* has no token '<\|end_of_text\|>'; did you mean '<\|endof"
    ):
        FileTokenizer.open(tmp_path / "tokenizer.json", bos="", eos="<|end_of_text|>")


def test_tokenizer_larger_than_the_vocabulary_is_refused():
    check_vocabulary(TOKENIZERS["trained"], 290, "model.vocab_size")
    with pytest.raises(TokenizerError, match=r"model\.vocab_size: the tokenizer has 290 tokens, more than 289; make"):
        check_vocabulary(TOKENIZERS["trained"], 289, "model.vocab_size")
