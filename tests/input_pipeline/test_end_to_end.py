"""From files to batches and back to text: what stands in the batches is the documents, on any number of hosts."""

import collections
import itertools
import json

import numpy as np
import pytest

from lightning_jax.input_pipeline import (
    CorpusConfig,
    DataConfig,
    GlobalBatches,
    MixtureConfig,
    TokenizerConfig,
    encode,
    prepare,
    prepare_tokenizer,
    validation_batches,
)
from lightning_jax.optimizers.batch_size import BatchSizes
from lightning_jax.optimizers.config import BatchSizeConfig

BYTES = TokenizerConfig(kind="bytes", path="", vocab_size=258, bos="<s>", eos="</s>")
TRAINED = TokenizerConfig(kind="train", path="", vocab_size=300, bos="", eos="</s>")


def documents(name, count):
    """Texts of different lengths that say whose they are; in two scripts."""
    random = np.random.default_rng(len(name))
    words = ["attention", "state", "ντοκουμέντο", "decay", "expert", "\n", "长文本", "layer"]
    return [f"{name} {i}: " + " ".join(random.choice(words, random.integers(1, 30))) for i in range(count)]


@pytest.fixture
def texts():
    return {"web": documents("web", 60), "notes": documents("notes", 25)}


@pytest.fixture
def data(tmp_path, texts):
    """A DataConfig maker: "web" in two JSONL files with bad lines between, "notes" a folder of text files."""
    web, notes = tmp_path / "web", tmp_path / "notes" / "deep"
    web.mkdir()
    notes.mkdir(parents=True)
    for part, half in enumerate((texts["web"][:35], texts["web"][35:])):
        lines = [json.dumps({"text": text}) for text in half]
        lines[7:7] = ["", "{not json", json.dumps({"body": "of another kind"})]
        (web / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    for number, text in enumerate(texts["notes"]):
        (notes / f"{number:03d}.txt").write_text(text)

    def make(tokenizer):
        return DataConfig(
            corpora={
                "web": CorpusConfig(format="jsonl", path=str(web), split="", field="text", content="text", turns="all"),
                "notes": CorpusConfig(
                    format="text", path=str(tmp_path / "notes"), split="", field="", content="text", turns="all"
                ),
            },
            tokenizer=tokenizer,
            cache_dir=str(tmp_path / "cache"),
            validation_fraction=0.2,
            on_bad_record="skip",
            max_document_bytes=100_000,
            chat_template="",
        )

    return make


def all_batches(corpora, packing, context_length, batch_rows, num_steps, hosts):
    """Every batch of a stage with web and notes half and half, put together from the parts of `hosts` hosts."""
    tokens = batch_rows * context_length
    sizes = BatchSizeConfig(tokens=(tokens,), starts=(0,), micro_batch_tokens=0)
    parts = [
        GlobalBatches(
            {name: corpus.train for name, corpus in corpora.items()},
            MixtureConfig({"web": 1, "notes": 1}, {"web": 1, "notes": 1}, packing),
            BatchSizes(sizes, context_length, tokens * num_steps),
            context_length,
            seed=5,
            process_index=host,
            process_count=hosts,
        )
        for host in range(hosts)
    ]
    steps = [[part[step] for part in parts] for step in range(num_steps)]
    return [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps]


def pieces(batches):
    """The token ids of every piece of a document in the batches, its last target included."""
    for batch in batches:
        for inputs, targets, segments, mask in zip(
            *(batch[name] for name in ("inputs", "targets", "segment_ids", "loss_mask")), strict=True
        ):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                if mask[here].any():
                    yield [inputs[here][0], *targets[here & mask]]


@pytest.mark.parametrize("tokenizer_config", [BYTES, TRAINED], ids=["bytes", "trained"])
def test_best_fit_batches_decode_to_the_documents(data, texts, tokenizer_config):
    config = data(tokenizer_config)
    tokenizer = prepare_tokenizer(config)
    corpora = prepare(config, tokenizer)
    one_host = all_batches(corpora, "best_fit", 1024, batch_rows=8, num_steps=6, hosts=1)
    four_hosts = all_batches(corpora, "best_fit", 1024, batch_rows=8, num_steps=6, hosts=4)
    for left, right in zip(one_host, four_hosts, strict=True):
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])

    found = {tokenizer.decode(piece) for piece in pieces(one_host)}
    held_out = {
        tokenizer.decode(corpus.validation.document(index))
        for corpus in corpora.values()
        for index in range(len(corpus.validation))
    }
    assert len(held_out) > 5
    assert found.isdisjoint(held_out)
    assert found | held_out == {*texts["web"], *texts["notes"]}


def test_one_pass_of_split_batches_holds_every_pair_of_tokens_once(data, texts):
    config = data(BYTES)
    tokenizer = prepare_tokenizer(config)
    corpora = prepare(config, tokenizer)
    context_length = 48
    one_host = all_batches(corpora, "split", context_length, batch_rows=16, num_steps=40, hosts=1)
    four_hosts = all_batches(corpora, "split", context_length, batch_rows=16, num_steps=40, hosts=4)
    for left, right in zip(one_host, four_hosts, strict=True):
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])

    for name, corpus in corpora.items():
        store = corpus.train
        expected = collections.Counter(
            pair for index in range(len(store)) for pair in itertools.pairwise(store.document(index).tolist())
        )
        # Rows of this corpus alone, as many as one pass has.
        alone = GlobalBatches(
            {name: store},
            MixtureConfig({name: 1}, {name: 1}, "split"),
            BatchSizes(BatchSizeConfig((context_length,), (0,), 0), context_length, store.num_tokens - 1),
            context_length,
            seed=1,
        )
        batches = [alone[step] for step in range(len(alone))]
        found = collections.Counter(pair for piece in pieces(batches) for pair in itertools.pairwise(piece))
        assert found == expected

    whole = {f"\0{text}\1".encode() for name in texts for text in texts[name]}
    for piece in pieces(one_host):
        text = bytes(token if token < 256 else token - 256 for token in piece)  # bos as 0, eos as 1
        assert any(text in document for document in whole)


def test_bad_records_are_counted_and_left_out(data):
    config = data(BYTES)
    report = prepare(config, prepare_tokenizer(config))["web"].report
    assert report.documents == 60
    assert report.skipped == {"empty": 2, "malformed": 2, "missing field": 2}


def test_preparing_again_gives_the_same_batches(data):
    first, second = (
        all_batches(prepare(config, prepare_tokenizer(config)), "best_fit", 256, batch_rows=4, num_steps=3, hosts=1)
        for config in (data(TRAINED), data(TRAINED))
    )
    for left, right in zip(first, second, strict=True):
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_validation_batches_are_the_held_out_documents(data, texts):
    config = data(BYTES)
    tokenizer = prepare_tokenizer(config)
    corpus = prepare(config, tokenizer)["web"]
    batches = validation_batches(corpus.validation, 4096, batch_rows=4, num_batches=9)
    decoded = "".join(tokenizer.decode(piece) for piece in pieces(batches))
    held_out = [text for text in texts["web"] if text in decoded]
    assert decoded == "".join(held_out)
    assert len(held_out) == len(corpus.validation) > 3
    assert sum(int(batch["loss_mask"].sum()) for batch in batches) == sum(
        len(encode(tokenizer, text)) + 1 for text in held_out
    )
