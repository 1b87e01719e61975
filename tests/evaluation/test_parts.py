"""Parts of an evaluation are kept as soon as they are there, and taken from there where the question is the same."""

import json

import pytest

from lightning_jax.errors import UserError
from lightning_jax.evaluation import Part, run_parts

MODEL = {"name": "tiny", "fingerprint": "abc"}


@pytest.fixture
def asked():
    return []


@pytest.fixture
def run(tmp_path, asked):
    def run(*parts, model=MODEL, said=None):
        def part(kind, name, question):
            return Part(kind, name, question, lambda: asked.append(name) or {"results": {name: {"acc,none": 0.5}}})

        given = [part("lm_eval", name, question) for name, question in parts]
        return run_parts(given, model, tmp_path / "out", (said if said is not None else []).append)

    return run


def written(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_what_is_there_is_not_asked_again(run, asked, tmp_path):
    run(("a", {"limit": (1, None)}))
    said = []
    results = run(("b", {}), ("a", {"limit": (1, None)}), said=said)
    assert asked == ["a", "b"]
    assert said == ["lm_eval: a: it is in results.json already", "lm_eval: b"]
    assert list(results["lm_eval"]) == ["b", "a"]
    assert written(tmp_path) == json.loads(json.dumps(results))


def test_another_question_or_model_is_asked_anew_and_what_is_not_asked_for_goes(run, asked, tmp_path):
    run(("a", {"limit": 1}), ("b", {}))
    assert list(run(("a", {"limit": 2}))["lm_eval"]) == ["a"]
    said = []
    run(("a", {"limit": 2}), model=MODEL | {"fingerprint": "other"}, said=said)
    assert asked == ["a", "b", "a", "a"]
    assert said[0] == (
        f"{tmp_path / 'out' / 'results.json'}: of another model, or of this one before it was trained on; "
        "all is evaluated anew"
    )


def test_a_part_that_fails_leaves_those_before_it(run, tmp_path):
    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parts(
            [Part("lm_eval", "a", {}, lambda: {"results": {}}), Part("lm_eval", "b", {}, fails)],
            MODEL,
            tmp_path / "out",
            lambda line: None,
        )
    assert list(written(tmp_path)["lm_eval"]) == ["a"]


def test_other_kinds_stay(run, tmp_path):
    run(("a", {}))
    cell = {"length": 9, "depth": 0, "choice": 1.0, "exact_match": 0.0, "answer_nats": 1.0}
    needle = Part("needle", "9 tokens", {"trials": 1, "distractors": 1}, lambda: {"cells": [cell]})
    run_parts([needle], MODEL, tmp_path / "out", lambda line: None)
    assert list(written(tmp_path)) == ["model", "lm_eval", "needle"]


@pytest.mark.parametrize("text", ["[]", "not json", '{"model": 1}', '{"loss": 2}'])
def test_a_file_that_is_something_else_is_left_alone(run, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(text)
    with pytest.raises(UserError, match="not"):
        run(("a", {}))
    assert (tmp_path / "out" / "results.json").read_text() == text


def test_a_folder_that_cannot_be_written_is_found_out_before_anything_is_asked(run, asked, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="it is no folder"):
        run(("a", {}))
    assert not asked
