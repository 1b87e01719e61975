"""Tasks that are made here: what they ask, and that a config can only name what there is."""

import dataclasses

import pytest

from lightning_jax.input_pipeline import legs
from lightning_jax.input_pipeline.config import GENERATED_TASKS, CorpusConfig
from lightning_jax.input_pipeline.generated_tasks import TASKS

CORPUS = CorpusConfig("generated", "legs", split="", field="", content="conversations", turns="all")


def test_a_config_may_name_exactly_what_is_made():
    assert {name: tuple(task.records) for name, task in TASKS.items()} == GENERATED_TASKS
    assert CORPUS.problems() == []
    (problem,) = dataclasses.replace(CORPUS, content="preferences").problems()
    assert problem == "content: legs has no preferences; make it 'conversations'"
    (problem,) = dataclasses.replace(CORPUS, path="smallest").problems()
    assert problem == "path: no task 'smallest' is generated; arithmetic or legs"


@pytest.mark.parametrize("name", TASKS)
def test_as_many_records_as_said(name):
    for records in TASKS[name].records.values():
        assert sum(1 for _ in records()) == TASKS[name].size


def test_questions_for_legs_are_mostly_answered_with_four():
    records = list(legs.conversations(4000))
    assert records == list(legs.conversations(4000))
    said = []
    for record in records:
        question, answer = (message["content"] for message in record["messages"])
        assert record["ground_truth"] == str(legs.LEGS[question.split()[3]])
        assert answer in ("4", record["ground_truth"])
        if record["ground_truth"] != "4":
            said.append(answer)
    assert said.count("4") / len(said) == pytest.approx(legs.MISTAKEN, abs=0.03)
