"""Chats and preferences from files to rows: bad records by file, line and field; whole, masked, unmixed."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_store import MemoryStore

from lightning_jax.input_pipeline import CorpusConfig, DataConfig, TokenizerConfig, prepare, prepare_tokenizer
from lightning_jax.input_pipeline import word_problems as tasks
from lightning_jax.input_pipeline.chat_records import chat_document, chat_prompt, prompt, read_document
from lightning_jax.input_pipeline.chat_template import ChatTemplateError
from lightning_jax.input_pipeline.errors import BadRecordError
from lightning_jax.input_pipeline.examples import pack
from lightning_jax.input_pipeline.packing import PackingError
from lightning_jax.input_pipeline.readers import Problem

ASK, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
CHAT = [ASK, ANSWER]
WORSE = [ASK, {"role": "assistant", "content": "no"}]


def data(tmp_path, **corpora):
    return DataConfig(
        corpora=corpora,
        tokenizer=TokenizerConfig("bytes", path="", vocab_size=257, bos="", eos="</s>"),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.25,
        on_bad_record="skip",
        max_document_bytes=10_000,
        chat_template="tulu",
    )


def corpus(path, content="conversations", turns="all", kind="jsonl"):
    return CorpusConfig(kind, str(path), split="", field="", content=content, turns=turns)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def text(store, document, trained=False):
    part = slice(store.offsets[document], store.offsets[document + 1])
    ids = store.tokens[part][store.trained[part]] if trained else store.tokens[part]
    return bytes(int(token) for token in ids if token < 256).decode()


@pytest.mark.parametrize(
    ("record", "content", "problem"),
    [
        ([1], "conversations", "wrong type: the record is a list, not an object with fields"),
        ({"mesages": CHAT}, "conversations", "missing field: no field 'messages'; did you mean 'mesages'?"),
        ({"messages": "hi"}, "conversations", "wrong type: 'messages' is a str, not a list of messages"),
        ({"messages": [ASK, "so"]}, "conversations", "wrong type: 'messages[1]' is a str, not a message"),
        ({"messages": [{"content": "x"}]}, "conversations", "missing field: 'messages[0]' has no role"),
        ({"messages": [{"role": "user"}]}, "conversations", "missing field: 'messages[0]' has no content"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "conversations",
            "wrong type: 'messages[0].content' is a int, not text",
        ),
        ({"messages": [ASK]}, "conversations", "nothing to train on: 'messages' has no message of the assistant"),
        ({"messages": [ASK, {"role": "gpt", "content": "so"}]}, "conversations", "assistant; its roles: user, gpt"),
        ({"chosen": CHAT}, "preferences", "missing field: no field 'rejected'; there are chosen"),
        ({"chosen": CHAT, "rejected": [ASK]}, "preferences", "'rejected' has no message of the assistant"),
        ({"chosen": CHAT, "rejected": [ASK, *CHAT]}, "preferences", "no pair: 'chosen' and 'rejected' do not answer"),
        ({"chosen": "a", "rejected": "b"}, "preferences", "missing field: no field 'prompt'"),
        ({"chosen": CHAT, "rejected": WORSE, "margin": "2"}, "preferences", "'margin' is a str, not a number"),
    ],
)
def test_a_bad_record_says_which_field_and_why(record, content, problem):
    found = chat_document(record, content)
    assert isinstance(found, Problem)
    assert problem in str(found)


@pytest.mark.parametrize(
    ("record", "chat", "fields"),
    [
        ({"prompt": "why?", "ground_truth": "72"}, [ASK], {"ground_truth": "72"}),
        ({"prompt": [ASK], "ground_truth": ["a", "b"], "dataset": None}, [ASK], {"ground_truth": ["a", "b"]}),
        ({"prompt": [ASK, ANSWER, ASK]}, [ASK, ANSWER, ASK], {}),
        ({"messages": [*CHAT, ASK], "dataset": "gsm8k"}, [ASK], {"dataset": "gsm8k"}),
    ],
)
def test_a_prompt_keeps_the_other_fields_of_its_record(record, chat, fields):
    assert chat_prompt(record) == (chat, fields)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("why?", "wrong type: the record is a str, not an object with fields"),
        ({"promt": "why?"}, "missing field: no field 'prompt'; did you mean 'promt'?"),
        ({"prompt": 3}, "wrong type: 'prompt' is a int, not a list of messages"),
        ({"prompt": [{"role": "user"}]}, "missing field: 'prompt[0]' has no content"),
        ({"prompt": CHAT}, "nothing to answer: 'prompt' does not end with a message to the assistant"),
        ({"messages": [ANSWER]}, "nothing to answer: 'messages' does not end with a message to the assistant"),
    ],
)
def test_a_bad_prompt_says_which_field_and_why(record, problem):
    assert str(chat_prompt(record)) == problem


def test_all_ways_to_write_a_preference_are_one_document():
    whole = chat_document({"chosen": CHAT, "rejected": WORSE}, "preferences")
    answers = {"prompt": [ASK], "chosen": CHAT[1:], "rejected": WORSE[1:]}
    assert chat_document(answers, "preferences") == whole
    assert chat_document({"prompt": "why?", "chosen": "so", "rejected": "no"}, "preferences") == whole
    null = {"chosen": [{**ASK, "name": None}, ANSWER], "rejected": WORSE, "tools": None}
    assert chat_document(null, "preferences") == whole
    assert read_document(whole.encode())["chats"] == [CHAT, WORSE]
    assert json.loads(prompt(whole.encode())) == [ASK]


def test_conversations_from_jsonl_and_parquet_are_the_same_tokens(tmp_path):
    chats = [[ASK, {"role": "assistant", "content": f"so {number}"}] for number in range(20)]
    write(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    pq.write_table(pa.table({"id": range(20), "messages": chats}), tmp_path / "a.parquet")
    config = data(tmp_path, json=corpus(tmp_path / "a.jsonl"), rows=corpus(tmp_path / "a.parquet", kind="parquet"))
    config = dataclasses.replace(config, validation_fraction=0.0)
    corpora = prepare(config, prepare_tokenizer(config))
    ours, theirs = corpora["json"].train, corpora["rows"].train
    assert ours.fingerprint == theirs.fingerprint
    assert text(ours, 7) == "<|user|>\nwhy?\n<|assistant|>\nso 7"
    assert text(ours, 7, trained=True) == "so 7"
    assert ours.tokens[ours.offsets[8] - 1] == 256  # the end token, and
    assert ours.trained[ours.offsets[8] - 1]


def test_bad_records_are_counted_by_place_also_those_the_template_refuses(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": [ASK]}, {"messages": [{"role": "x"}]}])
    config = dataclasses.replace(data(tmp_path, mine=corpus(path)), validation_fraction=0.0)
    prepared = prepare(config, prepare_tokenizer(config))["mine"]
    assert prepared.report.documents == 1
    assert prepared.report.examples[0].startswith(f"{path}:2: nothing to train on: 'messages' has no message")
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{% if messages[0].content == 'why?' %}{{ raise_exception('no why') }}{% endif %}")
    config = dataclasses.replace(config, on_bad_record="stop", chat_template=str(refusing))
    write(path, [{"messages": CHAT}])
    with pytest.raises(BadRecordError, match=r"a\.jsonl:1: refused by the chat template: line 1: no why; mend it"):
        prepare(config, prepare_tokenizer(config))


def test_preferences_are_two_documents_and_held_out_by_their_prompt(tmp_path):
    records = [
        {"prompt": f"ask {number % 40}", "chosen": f"good {number}", "rejected": f"bad {number}", "margin": number}
        for number in range(120)
    ]
    config = data(tmp_path, pairs=corpus(write(tmp_path / "p.jsonl", records), "preferences"))
    prepared = prepare(config, prepare_tokenizer(config))["pairs"]
    prompts = []
    for store in (prepared.train, prepared.validation):
        assert len(store) % 2 == 0
        prompts.append({text(store, document).split("\n")[1] for document in range(len(store))})
        for pair in range(len(store) // 2):
            chosen, rejected = (text(store, 2 * pair + side, trained=True) for side in (0, 1))
            number = int(chosen.removeprefix("good "))
            assert rejected == f"bad {number}"
            assert store.document_values["margin"][2 * pair : 2 * pair + 2].tolist() == [number, number]
    assert len(prompts[0] | prompts[1]) == 40
    assert not prompts[0] & prompts[1]
    assert 0 < len(prompts[1]) < 20


def test_another_template_is_another_corpus(tmp_path):
    config = data(tmp_path, mine=corpus(write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 3)))
    config = dataclasses.replace(config, validation_fraction=0.0)
    tokenizer = prepare_tokenizer(config)
    folders = {
        prepare(dataclasses.replace(config, chat_template=name), tokenizer)["mine"].train.folder
        for name in ("tulu", "chatml")
    }
    assert len(folders) == 2
    with pytest.raises(ChatTemplateError, match=r"data\.chat_template: chatm: No such file"):
        prepare(dataclasses.replace(config, chat_template="chatm"), tokenizer)


def examples(tmp_path, lengths, seed=0):
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    trained = random.random(offsets[-1]) < 0.5
    trained[offsets[1:] - 1] = True
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.uint32)
    values = {"margin": np.arange(len(lengths), dtype=np.float32) + 1}
    tmp_path.mkdir(exist_ok=True)
    return MemoryStore(tmp_path, tokens, offsets, trained, values)


@pytest.mark.parametrize("packing", ["best_fit", "one_per_row"])
@pytest.mark.parametrize("per_example", [1, 2])
def test_every_example_is_whole_in_one_row_cut_at_its_share(tmp_path, packing, per_example):
    T = 32
    store = examples(tmp_path, np.random.default_rng(1).integers(2, 40, 60))
    rows = pack(store, packing, T, per_example)
    if packing == "one_per_row":
        assert len(rows) == 60 // per_example
    batch = rows.take(np.arange(len(rows)))
    where, segment, document = rows.documents(np.arange(len(rows)))
    assert sorted(document) == list(range(60))
    for row, column, number in zip(where, segment, document, strict=True):
        begin, end = store.offsets[number : number + 2]
        length = min(end - begin, T // per_example)  # its last token has no target
        place = batch["segment_ids"][row] == column + 1
        assert batch["inputs"][row][place].tolist() == store.tokens[begin : begin + length].tolist()
        trained = np.append(store.trained[begin + 1 : begin + length], False)
        assert batch["loss_mask"][row][place].tolist() == trained.tolist()
        targets = np.where(trained, np.append(store.tokens[begin + 1 : begin + length], 0), 0)
        assert batch["targets"][row][place].tolist() == targets.tolist()
        assert batch["margin"][row, column] == number + 1
        if per_example == 2 and number % 2 == 0:  # its rejected chat is the next segment of the row
            assert number + 1 in document[(where == row) & (segment == column + 1)]
            assert column % 2 == 0
    assert (batch["margin"] > 0).sum() == 60


def test_chats_are_not_cut_and_text_has_no_pairs(tmp_path):
    store = examples(tmp_path, [5, 6, 7])
    with pytest.raises(PackingError, match='"split" would cut chats'):
        pack(store, "split", 8)
    with pytest.raises(PackingError, match="an odd number of chats"):
        pack(store, "best_fit", 8, 2)
    with pytest.raises(PackingError, match="has no pairs"):
        pack(dataclasses.replace(store, trained=None), "best_fit", 8, 2)


def test_word_problems_are_right_different_and_repeatable():
    records = list(tasks.conversations(400))
    assert records == list(tasks.conversations(400))
    assert len({record["messages"][0]["content"] for record in records}) == 400
    for record in records:
        solution = record["messages"][1]["content"]
        calculation, _, answer = solution.partition(" = ")
        a, sign, b = calculation.split()
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(record["ground_truth"])
        assert answer == f"{record['ground_truth']}\n#### {record['ground_truth']}"
    for record, pair in zip(records, tasks.preferences(400), strict=True):
        assert pair["chosen"] == record["messages"]
        assert pair["rejected"][0] == pair["chosen"][0]
        assert pair["rejected"][1] != pair["chosen"][1]
