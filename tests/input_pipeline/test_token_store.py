"""Token stores: what goes in comes out, and nothing else is taken for a store."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_jax.input_pipeline.errors import TokenStoreError
from lightning_jax.input_pipeline.token_store import TokenStore, TokenStoreWriter, token_dtype


def write(folder, documents, vocab_size=1000):
    with TokenStoreWriter(folder, vocab_size=vocab_size, tokenizer="fingerprint") as writer:
        for document in documents:
            writer.append(np.array(document, np.int64))
    return TokenStore.open(folder)


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 69_999), max_size=20), max_size=12),
    vocab_size=st.sampled_from([70_000, 2**31]),
)
def test_documents_come_back_as_written(tmp_path_factory, documents, vocab_size):
    store = write(tmp_path_factory.mktemp("store") / "s", documents, vocab_size)
    assert len(store) == len(documents)
    assert [store.document(i).tolist() for i in range(len(store))] == documents
    assert store.num_tokens == len(store.tokens) == sum(map(len, documents))
    assert store.manifest.largest_token == max((max(d) for d in documents if d), default=-1)
    store.verify()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_dtype_is_the_smallest_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    store = write(tmp_path / "s", [[0, vocab_size - 1]], vocab_size)
    assert store.tokens.dtype == dtype
    assert store.document(0).tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("token", [-1, 1000])
def test_token_outside_the_vocabulary_is_refused(tmp_path, token):
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 1,000"):
        write(tmp_path / "s", [[1, token]])
    assert list(tmp_path.iterdir()) == []


def test_failed_writer_leaves_the_previous_store_alone(tmp_path):
    write(tmp_path / "s", [[1, 2]])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        write(tmp_path / "s", [[3], [1000]])
    assert TokenStore.open(tmp_path / "s").document(0).tolist() == [1, 2]
    write(tmp_path / "s", [[4]])
    assert TokenStore.open(tmp_path / "s").document(0).tolist() == [4]


def test_unfinished_store_is_not_taken_for_a_store(tmp_path):
    writer = TokenStoreWriter(tmp_path / "s", vocab_size=10).__enter__()
    writer.append([1])
    with pytest.raises(TokenStoreError, match=r"manifest\.json: missing: this folder holds no finished"):
        TokenStore.open(tmp_path / "s")
    (partial,) = tmp_path.iterdir()
    with pytest.raises(TokenStoreError, match=r"manifest\.json: missing"):
        TokenStore.open(partial)


def test_appended_stores_equal_one_store(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_jax.input_pipeline.token_store._BLOCK_BYTES", 16)  # several blocks per store
    documents = [[1, 2, 3], [], [4] * 50, [5], [], [6, 7]]
    write(tmp_path / "a", documents[:4])
    write(tmp_path / "b", documents[4:])
    with TokenStoreWriter(tmp_path / "ab", vocab_size=1000) as writer:
        writer.append_store(TokenStore.open(tmp_path / "a"))
        writer.append_store(TokenStore.open(tmp_path / "b"))
    assert TokenStore.open(tmp_path / "ab").fingerprint == write(tmp_path / "whole", documents).fingerprint


def test_document_out_of_range_is_an_index_error(tmp_path):
    store = write(tmp_path / "s", [[1]])
    with pytest.raises(IndexError, match="no document 1; the store holds 1"):
        store.document(1)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "lengthened", "missing", "empty"])
def test_damaged_file_is_refused_by_name(tmp_path, name, damage):
    write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    path = tmp_path / "s" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-1], "lengthened": content + b"0", "empty": b""}[damage])
    with pytest.raises(TokenStoreError, match=name) as error:
        TokenStore.open(tmp_path / "s")
    assert "\n" not in str(error.value)


def test_offsets_that_do_not_rise_are_refused(tmp_path):
    write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    np.array([0, 9, 5], "<i8").tofile(tmp_path / "s" / "offsets.bin")
    with pytest.raises(TokenStoreError, match=r"offsets\.bin: damaged: offsets do not rise"):
        TokenStore.open(tmp_path / "s")


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin"])
def test_every_flipped_bit_is_found_by_verify(tmp_path, name):
    write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    path = tmp_path / "s" / name
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(TokenStoreError, match=name):
            TokenStore.open(tmp_path / "s").verify()


@pytest.mark.parametrize(
    ("entry", "value"),
    [("format_version", 0), ("dtype", "<f4"), ("num_tokens", "5"), ("num_documents", -1), ("tokenizer", None)],
)
def test_manifest_that_makes_no_sense_is_refused(tmp_path, entry, value):
    write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    if value is None:
        del manifest[entry]
    else:
        manifest[entry] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(TokenStoreError, match=r"manifest\.json"):
        TokenStore.open(tmp_path / "s")
