"""Preparing corpora: a function of data and config alone, made once, whole or not at all."""

import dataclasses
import importlib
import json
import logging
import multiprocessing
import random
import shutil
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_jax.input_pipeline import sources, store_building, tokenizer_training
from lightning_jax.input_pipeline.cache import cache_folder
from lightning_jax.input_pipeline.config import CorpusConfig, DataConfig, TokenizerConfig
from lightning_jax.input_pipeline.documents import is_held_out
from lightning_jax.input_pipeline.errors import BadRecordError, DataError, SourceError, TokenizerError
from lightning_jax.input_pipeline.prepare import prepare
from lightning_jax.input_pipeline.token_store import TokenStoreWriter
from lightning_jax.input_pipeline.tokenizer_training import prepare_tokenizer

# The package names the function of the same name.
preparing = importlib.import_module("lightning_jax.input_pipeline.prepare")

WORDS = ["attention", "state", "decay", "token", "corpus", "layer", "the", "a", "of", "in", "to", "is"]


def write_corpus(folder, seed, documents=60, files=4):
    """Files of JSON lines, every third document twice."""
    noise = random.Random(seed)
    folder.mkdir(parents=True)
    texts = [" ".join(noise.choices(WORDS, k=noise.randint(1, 40))) for _ in range(documents)]
    for index in range(files):
        lines = [text for text in texts[index::files] for _ in range(1 + (len(text) % 3 == 0))]
        (folder / f"{index}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return texts


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PART_BYTES", 2000)  # one file each
    write_corpus(tmp_path / "data" / "web", seed=0)
    write_corpus(tmp_path / "data" / "books", seed=1)
    return DataConfig(
        corpora={
            name: CorpusConfig(
                "jsonl", str(tmp_path / "data" / name), split="", field="text", content="text", turns="all"
            )
            for name in ("web", "books")
        },
        tokenizer=TokenizerConfig("train", path="", vocab_size=300, bos="", eos="<|endoftext|>"),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.2,
        on_bad_record="skip",
        max_document_bytes=10_000,
        chat_template="",
    )


def run(config, **options):
    tokenizer = prepare_tokenizer(config)
    return tokenizer, prepare(config, tokenizer, **options)


def texts(tokenizer, store):
    return [tokenizer.decode(store.document(index)) for index in range(len(store))]


def contents(corpora):
    return {name: (corpus.train.fingerprint, corpus.validation.fingerprint) for name, corpus in corpora.items()}


def all_texts(folder):
    return [json.loads(line)["text"] for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


def test_stores_hold_every_document_once_in_order(config, tmp_path):
    tokenizer, corpora = run(config)
    for name, corpus in corpora.items():
        documents = all_texts(tmp_path / "data" / name)
        held_out = [is_held_out(text.encode(), 0.2) for text in documents]
        assert 0 < sum(held_out) < len(documents) / 2
        pairs = list(zip(documents, held_out, strict=True))
        assert texts(tokenizer, corpus.train) == [text for text, out in pairs if not out]
        assert texts(tokenizer, corpus.validation) == [text for text, out in pairs if out]
        assert all(corpus.train.document(index)[-1] == tokenizer.eos_id for index in range(len(corpus.train)))


def test_copies_of_a_document_are_never_on_both_sides(config):
    tokenizer, corpora = run(config)
    for corpus in corpora.values():
        assert not set(texts(tokenizer, corpus.train)) & set(texts(tokenizer, corpus.validation))


def test_held_out_part_does_not_change_when_the_corpus_grows(config, tmp_path):
    tokenizer, before = run(config)
    config = dataclasses.replace(config, tokenizer=TokenizerConfig("bytes", "", 300, "", "<|endoftext|>"))
    write_corpus(tmp_path / "more", seed=2)
    shutil.copy(tmp_path / "more" / "0.jsonl", tmp_path / "data" / "web" / "9.jsonl")
    after_tokenizer, after = run(config)
    assert set(texts(tokenizer, before["web"].validation)) < set(texts(after_tokenizer, after["web"].validation))


@given(document=st.binary(max_size=20), fraction=st.floats(0, 0.99))
def test_fraction_zero_holds_nothing_out_and_a_larger_one_more(document, fraction):
    assert not is_held_out(document, 0.0)
    assert not is_held_out(document, fraction) or is_held_out(document, fraction + 0.01)


def test_share_held_out_is_the_fraction():
    assert abs(sum(is_held_out(str(index).encode(), 0.1) for index in range(20_000)) / 20_000 - 0.1) < 0.01


def test_second_preparation_reads_the_cache(config, monkeypatch):
    before = contents(run(config)[1])
    monkeypatch.setattr(tokenizer_training, "train_tokenizer", None)
    monkeypatch.setattr(preparing, "build_store", None)
    assert contents(run(config)[1]) == before


def test_stores_of_parts_that_were_cut_elsewhere_are_not_used(config, monkeypatch):
    tokenizer = prepare_tokenizer(config)
    with monkeypatch.context() as patch:
        patch.setattr(store_building, "_put_together", lambda *_: sys.exit())
        with pytest.raises(SystemExit):
            prepare(config, tokenizer)
    monkeypatch.setattr(sources, "_PART_BYTES", 10_000)
    for corpus in prepare(config, tokenizer).values():
        assert len(corpus.train) + len(corpus.validation) == corpus.report.documents > 60


@pytest.mark.parametrize("change", ["file", "tokenizer", "validation_fraction", "max_document_bytes", "on_bad_record"])
def test_change_of_source_or_settings_prepares_again(config, tmp_path, change, monkeypatch):
    run(config)
    if change == "file":
        (tmp_path / "data" / "web" / "0.jsonl").write_text('{"text": "new"}\n')
    else:
        value = {
            "tokenizer": dataclasses.replace(config.tokenizer, vocab_size=280),
            "validation_fraction": 0.3,
            "max_document_bytes": 9_999,
            "on_bad_record": "stop",
        }[change]
        config = dataclasses.replace(config, **{change: value})
    built = []
    build = preparing.build_store
    monkeypatch.setattr(preparing, "build_store", lambda name, *rest: (built.append(name), build(name, *rest)))
    run(config)
    assert "web" in built


def test_batches_and_parts_have_no_influence_on_the_result(config, tmp_path, monkeypatch):
    before = contents(run(config)[1])
    monkeypatch.setattr(store_building, "_BATCH_BYTES", 100)
    monkeypatch.setattr(sources, "_PART_BYTES", 10_000)
    tokenizer = prepare_tokenizer(config)
    elsewhere = dataclasses.replace(config, cache_dir=str(tmp_path / "elsewhere"))
    assert contents(prepare(elsewhere, tokenizer)) == before


@pytest.mark.slow
def test_processes_have_no_influence_on_the_result(config, tmp_path):
    tokenizer, corpora = run(config)
    told = []
    elsewhere = dataclasses.replace(config, cache_dir=str(tmp_path / "elsewhere"))
    assert contents(prepare(elsewhere, tokenizer, processes=2, progress=told.append)) == contents(corpora)
    assert (told[-1].corpus, told[-1].parts_done, told[-1].parts) == ("web", 4, 4)


def test_progress_counts_up_to_everything(config):
    told = []
    _, corpora = run(config, progress=told.append)
    last = [progress for progress in told if progress.corpus == "web"][-1]
    assert (last.parts_done, last.parts) == (4, 4)
    assert last.tokens == corpora["web"].train.num_tokens + corpora["web"].validation.num_tokens
    assert last.documents == corpora["web"].report.documents


def test_killed_preparation_goes_on_from_its_finished_parts(config, tmp_path, monkeypatch):
    tokenizer = prepare_tokenizer(config)
    build_part, started = store_building._build_part, []

    def killed_at_the_third(name, config, tokenizer, encoder, read, folder, *rest):
        started.append(folder)
        if len(started) == 3:
            (folder / "train").mkdir(parents=True)  # as a kill in the middle would leave it
            raise KeyboardInterrupt
        return build_part(name, config, tokenizer, encoder, read, folder, *rest)

    monkeypatch.setattr(store_building, "_build_part", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tokenizer)
    resumed = contents(prepare(config, tokenizer))
    assert len(started) == 3 + 2 + 4  # two finished parts of the first corpus were not done again
    elsewhere = dataclasses.replace(config, cache_dir=str(tmp_path / "elsewhere"))
    assert contents(prepare(elsewhere, tokenizer)) == resumed


def test_kill_while_parts_are_put_together_leaves_no_trace(config, tmp_path, monkeypatch):
    tokenizer = prepare_tokenizer(config)
    with monkeypatch.context() as patch:

        def kill(*_):
            patch.setattr(TokenStoreWriter, "__exit__", lambda *_: None)  # a kill runs no clean-up
            sys.exit()

        patch.setattr(TokenStoreWriter, "append_store", kill)
        with pytest.raises(SystemExit):
            prepare(config, tokenizer)
    for corpus in prepare(config, tokenizer).values():
        assert sorted(path.name for path in corpus.train.folder.parent.iterdir()) == ["train", "validation"]
    left = {path.suffix for path in (tmp_path / "cache" / "corpora").iterdir()}
    assert left == {"", ".lock"}


def test_finished_cache_can_be_read_only(config, tmp_path, monkeypatch):
    before = contents(run(config)[1])
    monkeypatch.setattr(preparing, "lock", None)
    assert contents(run(config)[1]) == before


def test_cache_that_cannot_be_written_is_a_mistake_of_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*file/tokenizers: Not a directory; name a folder"):
        run(dataclasses.replace(config, cache_dir=str(tmp_path / "file")))


def test_damaged_cache_is_prepared_again_and_says_so(config, caplog):
    tokenizer, corpora = run(config)
    before = contents(corpora)
    path = corpora["web"].train.folder / "tokens.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 4
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert contents(prepare(config, tokenizer)) == before
    assert "tokens.bin: damaged" in caplog.text
    assert "preparing it again" in caplog.text


def test_damaged_tokenizer_is_trained_again(config, tmp_path):
    fingerprint = prepare_tokenizer(config).fingerprint
    (path,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    path.write_text(path.read_text()[:100])
    assert prepare_tokenizer(config).fingerprint == fingerprint


def _prepare_in_a_process(config, barrier, results):
    barrier.wait()
    results.put(contents(run(config)[1]))


@pytest.mark.slow
def test_two_processes_at_once_make_one_good_store(config, tmp_path):
    spawning = multiprocessing.get_context("spawn")
    barrier, results = spawning.Barrier(2), spawning.Queue()
    processes = [spawning.Process(target=_prepare_in_a_process, args=(config, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1]
    folders = [path.name for path in (tmp_path / "cache" / "corpora").iterdir() if path.is_dir()]
    assert len(folders) == 2


def test_second_thread_waits_for_the_first_and_builds_nothing(config, monkeypatch):
    tokenizer = prepare_tokenizer(config)
    build, built = preparing.build_store, []
    monkeypatch.setattr(preparing, "build_store", lambda name, *rest: (built.append(name), build(name, *rest)))
    results = []
    threads = [threading.Thread(target=lambda: results.append(contents(prepare(config, tokenizer)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == results[2]
    assert sorted(built) == ["books", "web"]


def test_what_was_skipped_is_still_known_from_the_cache(config, tmp_path):
    with (tmp_path / "data" / "web" / "2.jsonl").open("a") as file:
        file.write("not json\n\n")
    for _ in range(2):
        _, corpora = run(config)
        report = corpora["web"].report
        assert report.skipped == {"malformed": 1, "empty": 1}
        lines = len((tmp_path / "data" / "web" / "2.jsonl").read_text().splitlines())
        assert report.examples[0].startswith(f"{tmp_path}/data/web/2.jsonl:{lines - 1}: malformed")
        assert "skipped 2 of" in str(corpora["web"])
        assert f"{corpora['web'].train.num_tokens:,} tokens to train on" in str(corpora["web"])


def test_bad_record_can_stop_the_preparation(config, tmp_path):
    with (tmp_path / "data" / "web" / "2.jsonl").open("a") as file:
        file.write("not json\n")
    with pytest.raises(BadRecordError, match=r"web/2\.jsonl:\d+: malformed"):
        run(dataclasses.replace(config, on_bad_record="stop"))


def test_corpus_without_documents_is_refused(config, tmp_path):
    for file in (tmp_path / "data" / "web").iterdir():
        file.write_text("\n")
    with pytest.raises(
        SourceError, match=r"data\.corpora\.web: no document to train on: skipped 4 of 4 records \(4 empty"
    ):
        run(config)


def test_corpus_that_is_held_out_as_a_whole_is_refused(config, tmp_path):
    text = next(text for text in map(str, range(100)) if is_held_out(text.encode(), 0.2))
    (tmp_path / "book.txt").write_text(text)
    config = dataclasses.replace(
        config, corpora={"book": CorpusConfig("text", str(tmp_path / "book.txt"), "", "", "text", "all")}
    )
    with pytest.raises(SourceError, match=r"book: no document to train on: data\.validation_fraction holds out all"):
        run(config)


def test_wrong_field_names_corpus_and_nearest_field(config):
    corpora = {"web": dataclasses.replace(config.corpora["web"], field="txt")}
    with pytest.raises(SourceError, match=r"data\.corpora\.web: .*no field 'txt'; did you mean 'text'\?"):
        run(dataclasses.replace(config, corpora=corpora))


def test_prepared_corpus_can_be_used_as_tokens(config, tmp_path):
    tokenizer, corpora = run(config)
    tokens = CorpusConfig(
        "tokens", str(corpora["web"].train.folder.parent), split="", field="", content="text", turns="all"
    )
    config = dataclasses.replace(config, corpora={"mine": tokens})
    assert contents(prepare(config, tokenizer))["mine"] == contents(corpora)["web"]
    other = prepare_tokenizer(dataclasses.replace(config, tokenizer=TokenizerConfig("bytes", "", 300, "", "")))
    with pytest.raises(TokenizerError, match=r"data\.corpora\.mine: .* has another tokenizer"):
        prepare(config, other)


def test_tokenizer_never_sees_what_is_held_out(config, monkeypatch):
    seen = []
    train = tokenizer_training.train_tokenizer
    monkeypatch.setattr(
        tokenizer_training, "train_tokenizer", lambda texts, c: train((seen.append(t) or t for t in texts), c)
    )
    prepare_tokenizer(config)
    assert seen
    assert not any(is_held_out(text.encode(), 0.2) for text in seen)


def test_sample_for_the_tokenizer_is_capped_and_taken_from_every_corpus(config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tokenizer_training, "_SAMPLE_BYTES", 4000)
    train = tokenizer_training.train_tokenizer
    monkeypatch.setattr(
        tokenizer_training, "train_tokenizer", lambda texts, c: train((seen.append(t) or t for t in texts), c)
    )
    prepare_tokenizer(config)
    assert 3000 < sum(map(len, seen)) < 6000
    for name in config.corpora:
        for file in (tmp_path / "data" / name).iterdir():
            assert set(seen) & {json.loads(line)["text"] for line in file.read_text().splitlines()}


def test_tokenizer_file_is_used_and_its_size_checked(config, tmp_path):
    prepare_tokenizer(config).save(tmp_path / "tokenizer.json")
    settings = TokenizerConfig("file", str(tmp_path / "tokenizer.json"), 299, "", "<|endoftext|>")
    with pytest.raises(
        TokenizerError, match=r"data\.tokenizer\.vocab_size: the tokenizer has 300 tokens, more than 299"
    ):
        prepare_tokenizer(dataclasses.replace(config, tokenizer=settings))


def test_cache_is_in_the_users_cache_folder_by_default(config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(dataclasses.replace(config, cache_dir="")) == tmp_path / "xdg" / "lightning_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(dataclasses.replace(config, cache_dir="")) == tmp_path / ".cache" / "lightning_jax"
