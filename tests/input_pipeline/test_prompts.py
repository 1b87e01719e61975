"""Prompts end where the assistant begins, keep what verifiers read, and hold out what fine-tuning holds out."""

import dataclasses
import json

import pytest

from lightning_jax.input_pipeline import DataConfig, TokenizerConfig, prepare, word_problems
from lightning_jax.input_pipeline.config import CorpusConfig
from lightning_jax.input_pipeline.errors import SourceError
from lightning_jax.input_pipeline.prompts import read_prompts
from lightning_jax.input_pipeline.tokenizers import ByteTokenizer

SETTINGS = TokenizerConfig(kind="bytes", path="", vocab_size=257, bos="", eos="</s>")
TOKENIZER = ByteTokenizer(SETTINGS)


def data(folder, records, template="tulu", **fields) -> DataConfig:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus = {"format": "jsonl", "path": str(folder / "prompts.jsonl"), "split": "", "field": ""}
    return DataConfig(
        corpora={"prompts": CorpusConfig(**(corpus | {"content": "conversations", "turns": "all"} | fields))},
        tokenizer=SETTINGS,
        cache_dir=str(folder / "cache"),
        validation_fraction=0.3,
        on_bad_record="skip",
        max_document_bytes=2**20,
        chat_template=template,
    )


def test_a_prompt_is_what_stands_before_the_answer_and_its_record(tmp_path):
    records = list(word_problems.conversations(40))
    prompts = read_prompts("prompts", data(tmp_path, records), TOKENIZER, most_tokens=200)
    each = {prompt.chat[0]["content"]: prompt for prompt in (*prompts.train, *prompts.validation)}
    assert len(each) == 40
    prompt = each[records[0]["messages"][0]["content"]]
    assert prompt.record == {"ground_truth": records[0]["ground_truth"]}
    assert TOKENIZER.decode(list(prompt.ids)) == f"<|user|>\n{prompt.chat[0]['content']}\n<|assistant|>\n"
    assert prompts.end_of_turn == TOKENIZER.eos_id


def test_what_fine_tuning_holds_out_is_held_out(tmp_path):
    config = data(tmp_path, word_problems.conversations(60))
    prompts = read_prompts("prompts", config, TOKENIZER, most_tokens=200)
    store = prepare(config, TOKENIZER)["prompts"].validation
    chats = [TOKENIZER.decode(store.document(place).tolist()) for place in range(len(store))]
    assert len(chats) == len(prompts.validation) > 5
    for prompt in prompts.validation:
        assert any(prompt.chat[0]["content"] in chat for chat in chats)


def test_long_and_broken_prompts_are_left_out_and_counted(tmp_path):
    good = {"messages": [{"role": "user", "content": "1 + 1?"}], "ground_truth": "2"}
    records = [good, {"messages": [{"role": "user", "content": "x" * 500}]}, {"text": "no chat"}, {"messages": []}]
    config = data(
        tmp_path, [*records, *({**good, "messages": [{"role": "user", "content": str(n)}]} for n in range(9))]
    )
    prompts = read_prompts("prompts", config, TOKENIZER, most_tokens=100)
    assert len(prompts.train) + len(prompts.validation) == 10
    assert prompts.report.skipped == {"too long": 1, "missing field": 1, "nothing to answer": 1}


def test_other_ground_truths_are_other_prompts(tmp_path):
    records = [{"messages": [{"role": "user", "content": str(n)}], "ground_truth": "1"} for n in range(9)]
    first = read_prompts("prompts", data(tmp_path, records), TOKENIZER, most_tokens=100).fingerprint
    assert read_prompts("prompts", data(tmp_path, records), TOKENIZER, most_tokens=100).fingerprint == first
    records[3]["ground_truth"] = "2"
    assert read_prompts("prompts", data(tmp_path, records), TOKENIZER, most_tokens=100).fingerprint != first


def test_no_prompt_and_no_end_of_turn_are_told(tmp_path):
    with pytest.raises(SourceError, match=r"data.corpora.prompts: no prompt to train on"):
        read_prompts("prompts", data(tmp_path, [{"text": "no chat"}]), TOKENIZER, most_tokens=100)
    template = tmp_path / "endless.jinja"
    template.write_text(
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
        "{% endgeneration %}{% else %}{{ message.content }}:{% endif %}{% endfor %}"
    )
    config = data(tmp_path, word_problems.conversations(9), template=str(template))
    with pytest.raises(SourceError, match="ends the assistant's turn with no special token"):
        read_prompts("prompts", config, TOKENIZER, most_tokens=200)
    missing = data(tmp_path, [], path=str(tmp_path / "nothing.jsonl"))
    with pytest.raises(SourceError, match=r"data.corpora.prompts: .*no such file"):
        read_prompts("prompts", missing, TOKENIZER, most_tokens=200)


def test_of_parquet_files_the_columns_come_that_somebody_asks_for(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    columns = {
        "prompt": ["1 + 1?"],
        "ground_truth": ["2"],
        "pass_rate": [0.5],
        "strong_rate": [0.75],
        "notes": ["long"],
    }
    pq.write_table(pa.table(columns), tmp_path / "prompts.parquet")
    config = data(tmp_path, [], format="parquet", path=str(tmp_path / "prompts.parquet"))
    config = dataclasses.replace(config, validation_fraction=0.0)
    (prompt,) = read_prompts("prompts", config, TOKENIZER, most_tokens=200, fields={"strong_rate"}).train
    assert prompt.record == {"ground_truth": "2", "pass_rate": 0.5, "strong_rate": 0.75}
