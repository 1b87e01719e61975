"""Text that comes token by token is the tokenizer's text of them all, in whole characters, up to a stop text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from lightning_jax.generation import TextStream
from lightning_jax.input_pipeline import TokenizerConfig
from lightning_jax.input_pipeline.tokenizers import ByteTokenizer, FileTokenizer

BYTES = ByteTokenizer(TokenizerConfig(kind="bytes", path="", vocab_size=300, bos="<s>", eos="</s>"))


def pieces_tokenizer():
    """As SentencePiece writes words: a leading space belongs to the token, and goes at the beginning of a text."""
    words = ["<unk>", "▁", "▁the", "▁cat", "s", "▁sat", "."]
    backend = Backend(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return FileTokenizer(backend.to_str(), "pieces", bos="", eos="")


def stream(tokenizer, ids, stop=()):
    """All texts that a reader sees one after the other, and the stream."""
    text, seen = TextStream(tokenizer, stop), []
    for token in ids:
        goes_on = text.push(int(token))
        assert not seen or text.text.startswith(seen[-1])
        seen.append(text.text)
        if not goes_on:
            return seen, text
    seen.append(text.finish())
    return seen, text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=12))
def test_any_text_in_bytes_comes_whole_and_never_with_half_a_character(text):
    seen, _ = stream(BYTES, np.frombuffer(text.encode(), np.uint8))
    assert seen[-1] == text
    assert all(text.startswith(part) for part in seen)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 301), max_size=12))
def test_bytes_that_are_no_text_do_not_hold_the_rest_back(ids):
    seen, _ = stream(BYTES, [*ids, *b"end of text"])
    assert seen[-1].endswith("end of text")
    assert [c for c in seen[-1] if c != "\ufffd"] == [c for c in BYTES.decode([*ids, *b"end of text"]) if c != "\ufffd"]


def test_an_incomplete_last_character_is_left_out():
    assert stream(BYTES, "naï".encode()[:-1])[0][-1] == "na"


def test_words_keep_their_spaces():
    tokenizer = pieces_tokenizer()
    ids = [2, 3, 4, 5, 6]
    assert stream(tokenizer, ids)[0] == ["the", "the cat", "the cats", "the cats sat", "the cats sat.", "the cats sat."]


def test_special_tokens_are_no_text():
    assert stream(BYTES, [256, *b"a", 257, 257, 257, 257, 257, *b"b"])[0][-1] == "ab"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("aaab", ("aab",), "a"),
        ("Q: A: B", ("B", "A:"), "Q: "),
        ("ends in part of a st", ("stop",), "ends in part of a st"),
        ("größer", ("ß",), "grö"),
        ("nothing", (), "nothing"),
    ],
)
def test_a_stop_text_is_found_across_tokens_and_cut_off(text, stop, expected):
    seen, last = stream(BYTES, text.encode(), stop)
    assert last.text == expected
    assert last.stopped == (expected != text)
    assert all(expected.startswith(part) for part in seen)  # nothing is shown that a stop text takes back
