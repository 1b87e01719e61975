"""Tasks that are made here: what they ask, and that a config can only name what there is."""

import dataclasses

import pytest

from lightning_jax.input_pipeline import largest_number
from lightning_jax.input_pipeline.config import GENERATED_TASKS, CorpusConfig
from lightning_jax.input_pipeline.generated_tasks import TASKS

CORPUS = CorpusConfig("generated", "largest", split="", field="", content="conversations", turns="all")


def test_a_config_may_name_exactly_what_is_made():
    assert {name: tuple(task.records) for name, task in TASKS.items()} == GENERATED_TASKS
    assert CORPUS.problems() == []
    (problem,) = dataclasses.replace(CORPUS, content="preferences").problems()
    assert problem == "content: largest has no preferences; make it 'conversations'"
    (problem,) = dataclasses.replace(CORPUS, path="smallest").problems()
    assert problem == "path: no task 'smallest' is generated; arithmetic or largest"


@pytest.mark.parametrize("name", TASKS)
def test_as_many_records_as_said(name):
    for records in TASKS[name].records.values():
        assert sum(1 for _ in records()) == TASKS[name].size


def test_questions_for_the_largest_number_are_answered_by_guesses_and_never_asked_twice():
    records = list(largest_number.conversations(3000))
    assert records == list(largest_number.conversations(3000))
    asked, ranks = set(), []
    for record in records:
        question, guess = (message["content"] for message in record["messages"])
        numbers = [int(number) for number in question.removeprefix("Which is the largest: ")[:-1].split(", ")]
        assert len(set(numbers)) == 3
        assert int(record["ground_truth"]) == max(numbers)
        asked.add(frozenset(numbers))
        ranks.append(sorted(numbers).index(int(guess)))
    assert len(asked) == 3000
    assert all(ranks.count(rank) == pytest.approx(1000, abs=100) for rank in range(3))
