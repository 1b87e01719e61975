"""Packed rows against documents walked token by token: nothing lost, nothing twice, nothing across documents."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import memory_store

from lightning_jax.input_pipeline.packing import BestFitRows, PackingError, SplitRows, best_fit_decreasing

PACKINGS = [SplitRows, BestFitRows]
some_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(lambda lengths: max(lengths) > 1)


def all_rows(packing, lengths, context_length):
    with tempfile.TemporaryDirectory() as folder:
        store = memory_store(Path(folder), lengths)
        rows = packing(store, context_length)
        return store, rows.take(np.arange(len(rows)))


def pairs_of_documents(store):
    for first, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        document = store.tokens[first:end]
        yield from zip(document[:-1].tolist(), document[1:].tolist(), strict=True)


@pytest.mark.parametrize("packing", PACKINGS)
@settings(derandomize=True, deadline=None, max_examples=100)
@given(lengths=some_lengths, context_length=st.integers(1, 24))
def test_every_pair_of_every_document_occurs_exactly_once(packing, lengths, context_length):
    store, batch = all_rows(packing, lengths, context_length)
    mask = batch["loss_mask"]
    pairs = list(zip(batch["inputs"][mask].tolist(), batch["targets"][mask].tolist(), strict=True))
    # Tokens are all different, so equal sorted lists also say that no pair crosses documents.
    assert sorted(pairs) == sorted(pairs_of_documents(store))


@pytest.mark.parametrize("packing", PACKINGS)
@settings(derandomize=True, deadline=None, max_examples=100)
@given(lengths=some_lengths, context_length=st.integers(1, 24))
def test_segments_and_positions_are_those_of_the_pieces(packing, lengths, context_length):
    store, batch = all_rows(packing, lengths, context_length)
    document_of_token = np.repeat(np.arange(len(lengths)), lengths)
    for row in range(len(batch["inputs"])):
        inputs, segments, positions, targets, mask = (
            batch[name][row] for name in ("inputs", "segment_ids", "positions", "targets", "loss_mask")
        )
        filled = segments > 0
        assert filled[: filled.sum()].all(), "padding only at the end"
        assert filled.any()
        for array in (inputs, positions, targets, mask):
            assert not array[~filled].any()
        assert not targets[~mask].any()
        previous = 0
        for slot in np.flatnonzero(filled):
            same_piece = slot > 0 and segments[slot] == segments[slot - 1]
            assert segments[slot] == previous + (not same_piece)
            assert positions[slot] == (positions[slot - 1] + 1 if same_piece else 0)
            if same_piece:
                assert inputs[slot] == inputs[slot - 1] + 1
                assert document_of_token[inputs[slot] - 1] == document_of_token[inputs[slot - 1] - 1]
            previous = segments[slot]
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    assert batch["segment_ids"].dtype == batch["positions"].dtype == np.int32
    assert batch["loss_mask"].dtype == bool
    assert len(store.tokens) >= batch["loss_mask"].sum()


@settings(derandomize=True, deadline=None, max_examples=50)
@given(lengths=some_lengths, context_length=st.integers(1, 24))
def test_split_rows_are_the_token_stream_cut(lengths, context_length):
    store, batch = all_rows(SplitRows, lengths, context_length)
    stream = batch["inputs"].reshape(-1)
    used = batch["segment_ids"].reshape(-1) > 0
    np.testing.assert_array_equal(stream[used], store.tokens[: used.sum()])
    assert used.sum() >= len(store.tokens) - 1
    assert used[: used.sum()].all()


def test_split_row_by_hand(tmp_path):
    rows = SplitRows(memory_store(tmp_path, [3, 0, 1, 5], first_token=10), 4)
    assert len(rows) == 2
    first, second = rows[0], rows[1]
    assert first["inputs"].tolist() == [10, 11, 12, 13]
    assert first["targets"].tolist() == [11, 12, 0, 0]
    assert first["segment_ids"].tolist() == [1, 1, 1, 2]
    assert first["positions"].tolist() == [0, 1, 2, 0]
    assert first["loss_mask"].tolist() == [True, True, False, False]
    assert second["inputs"].tolist() == [14, 15, 16, 17]
    assert second["targets"].tolist() == [15, 16, 17, 18]
    assert second["segment_ids"].tolist() == [1, 1, 1, 1]


def test_best_fit_row_by_hand(tmp_path):
    # Inputs: 4 + 4 + 2 of the first document (cut), 2 of the second, 3 of the third, none of the others.
    rows = BestFitRows(memory_store(tmp_path, [11, 3, 4, 1, 0], first_token=10), 4)
    assert rows.take(np.arange(len(rows)))["inputs"].tolist() == [
        [10, 11, 12, 13],
        [14, 15, 16, 17],
        [24, 25, 26, 0],
        [18, 19, 21, 22],
    ]
    assert rows[3]["targets"].tolist() == [19, 20, 22, 23]
    assert rows[3]["segment_ids"].tolist() == [1, 1, 2, 2]
    assert rows[3]["positions"].tolist() == [0, 1, 0, 1]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(lengths=some_lengths, context_length=st.integers(1, 24))
def test_best_fit_keeps_documents_whole_where_they_fit(lengths, context_length):
    store, batch = all_rows(BestFitRows, lengths, context_length)
    for first, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        in_document = (batch["inputs"] > first) & (batch["inputs"] < end)  # its inputs are first + 1, ..., end - 1
        assert in_document.sum() == max(0, end - first - 1)
        pieces = np.count_nonzero(in_document & (batch["positions"] == 0))
        assert pieces == -(max(0, end - first - 1) // -context_length)


def best_fit_one_by_one(lengths, capacity):
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(capacity=st.integers(1, 60), data=st.data())
def test_best_fit_decreasing_equals_the_textbook_loop(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    rows = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    fill = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert sorted(capacity - fill) == best_fit_one_by_one(lengths, capacity)


@pytest.mark.parametrize("context_length", [512, 2048])
def test_best_fit_pads_less_than_three_percent_of_lengths_like_those_of_web_text(tmp_path, context_length):
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(int)  # median 400, mean 830 tokens
    assert BestFitRows(memory_store(tmp_path, lengths), context_length).fill > 0.97


def test_best_fit_is_the_same_from_the_disk_and_never_half_written(tmp_path, monkeypatch):
    lengths = np.random.default_rng(1).integers(0, 50, 500)
    store = memory_store(tmp_path / "store", lengths)
    fresh = BestFitRows(store, 32)
    everything = np.arange(len(fresh))
    files = sorted(path.name for path in store.folder.rglob("*"))
    monkeypatch.setattr("lightning_jax.input_pipeline.packing.best_fit_decreasing", None)
    cached = BestFitRows(store, 32)
    assert sorted(path.name for path in store.folder.rglob("*")) == files
    for name, array in cached.take(everything).items():
        np.testing.assert_array_equal(array, fresh.take(everything)[name])
    with pytest.raises(TypeError):
        BestFitRows(store, 16)  # packed anew, and the writer fails in the middle
    monkeypatch.undo()
    assert BestFitRows(store, 16).take(np.arange(2))["inputs"].shape == (2, 16)


def test_best_fit_packs_anew_when_the_store_changes(tmp_path):
    assert len(BestFitRows(memory_store(tmp_path, [5, 5]), 4)) == 2
    assert len(BestFitRows(memory_store(tmp_path, [5, 5, 5]), 4)) == 3


def test_windows_lose_nothing_and_bound_the_distance_between_documents_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(BestFitRows, "window", 7)
    lengths = np.random.default_rng(2).integers(0, 30, 100)
    store = memory_store(tmp_path, lengths)
    rows = BestFitRows(store, 16)
    batch = rows.take(np.arange(len(rows)))
    mask = batch["loss_mask"]
    pairs = zip(batch["inputs"][mask].tolist(), batch["targets"][mask].tolist(), strict=True)
    assert sorted(pairs) == sorted(pairs_of_documents(store))
    window_of_token = np.repeat(np.arange(100) // 7, lengths)
    for inputs, row_mask in zip(batch["inputs"], mask, strict=True):
        assert len(set(window_of_token[inputs[row_mask] - 1])) == 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_store_shorter_than_a_row_is_one_padded_row(packing, tmp_path):
    rows = packing(memory_store(tmp_path, [3]), 8)
    assert len(rows) == 1
    assert rows[0]["loss_mask"].tolist() == [True, True] + [False] * 6


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("lengths", [[], [0], [1, 1, 0]])
def test_store_with_nothing_to_predict_is_refused_in_one_line(packing, lengths, tmp_path):
    with pytest.raises(PackingError, match=r"^.*nothing to predict.*$") as caught:
        packing(memory_store(tmp_path, lengths), 8)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_outside_the_pass_are_refused(packing, tmp_path):
    rows = packing(memory_store(tmp_path, [30]), 8)
    for row in (-1, len(rows)):
        with pytest.raises(IndexError, match="no row"):
            rows[row]


def test_best_fit_in_a_store_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    store = memory_store(tmp_path, [5])
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PackingError, match=r"^.*cannot keep its best-fit packing here: Permission denied; .*$"):
        BestFitRows(store, 4)
