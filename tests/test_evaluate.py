"""The command that evaluates: which tasks it runs, what it writes, and a line for each mistake."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_run
from two_hosts import on_two_hosts

sys.path.append(str(pathlib.Path(__file__).parent / "evaluation"))
from tiny_evaluation import TOKENIZER, scorer, trained_model

from lightning_jax import evaluate
from lightning_jax.evaluation import perplexity

HAYSTACK = [f"line {number}\n" * 4 for number in range(200)]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    model = trained_model(context_length=512)
    monkeypatch.setattr(evaluate, "load_model", lambda source, **options: model)
    monkeypatch.setattr(
        evaluate.EmbeddedCorpus, "documents", property(lambda self: [("somewhere", text) for text in HAYSTACK])
    )
    return model


@pytest.fixture
def corpora(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "alpha beta"}\n{"text": "gamma"}\n')
    (tmp_path / "b.txt").write_text("delta epsilon")
    return [f"--corpus=first={tmp_path / 'a.jsonl'}:text", f"--corpus=second={tmp_path / 'b.txt'}"]


def run(*arguments):
    return evaluate.main(["--from=model", *arguments])


def errors(capsys, *arguments):
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return [line.removeprefix("error: ") for line in output.err.splitlines() if line.startswith("error: ")]


def test_perplexity_of_each_corpus_is_shown_and_written(corpora, tmp_path, capsys):
    assert run("perplexity", *corpora, "--context_length=64", f"--out={tmp_path / 'out'}") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["name"] == "tiny"
    assert results["model"]["step"] == 7
    expected = perplexity(scorer(), ["alpha beta", "gamma"], context_length=64, stride=32, layout="documents")
    assert results["perplexity"]["first"]["tokens"] == 15
    assert results["perplexity"]["first"]["nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=1e-6)
    assert results["perplexity"]["second"]["documents"] == 1
    shown = capsys.readouterr().out
    assert "Perplexity by corpus" in shown
    assert "Perplexity by position" in shown
    assert (tmp_path / "out" / "evaluation.html").exists()


def test_an_evaluation_that_was_stopped_goes_on_with_the_parts_that_are_missing(
    corpora, tiny_model, tmp_path, monkeypatch, capsys
):
    arguments = ("perplexity", *corpora, "--context_length=64", f"--out={tmp_path / 'out'}")
    whole, asked = evaluate.perplexity, []

    def stops_at_the_second(scorer, texts, **how):
        asked.append(texts)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(scorer, texts, **how)

    monkeypatch.setattr(evaluate, "perplexity", stops_at_the_second)
    assert run(*arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped; what was finished is in {tmp_path / 'out'}, and the same command goes on from there"
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["perplexity"]) == ["first"]
    assert run(*arguments) == 0
    assert asked == [["alpha beta", "gamma"], ["delta epsilon"], ["delta epsilon"]]
    assert "perplexity: first: it is in results.json already" in capsys.readouterr().err
    assert run(*arguments, "--stride=64") == 0  # another question
    assert len(asked) == 5
    tiny_model.params["embedding"] = tiny_model.params["embedding"].replace(tiny_model.params["embedding"][...] * 2)
    assert run(*arguments, "--stride=64") == 0  # another model
    assert len(asked) == 7
    assert "of another model, or of this one before it was trained on; all is evaluated anew" in capsys.readouterr().err


@pytest.mark.slow
def test_needles_are_asked_for_at_each_length_and_depth(capsys):
    assert run("needle", "--lengths=200,256", "--depths=0,100", "--trials=1", "--distractors=2") == 0
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines() if "%" in line]
    assert [row[:2] for row in rows] == [["200", "0%"], ["200", "100%"], ["256", "0%"], ["256", "100%"]]
    assert "needle: 200 tokens" in shown.err


def test_every_mistake_in_the_options_has_its_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}\n')
    lines = errors(
        capsys,
        *("perplexity", "needel", "missing.yaml"),
        *(f"--corpus={tmp_path / 'a.jsonl'}:text", f"--corpus=a={tmp_path / 'a.jsonl'}:text", "--corpus=b=gone.txt"),
        *("--lengths=1,x", "--trials=0", "--mesh=dat=2", "--context_length=0", "--batch_tokens=-1", "--limit=0"),
    )
    text = "\n".join(lines)
    assert "needel: no such task; did you mean 'needle'?" in text
    assert "missing.yaml: " in text
    assert f"--corpus={tmp_path / 'a.jsonl'}:text: not of the form NAME=PATH[:FIELD]" in text
    assert f"--corpus=a: {tmp_path / 'a.jsonl'}:1: missing field: no field 'text'; did you mean 'txt'?" in text
    assert "--corpus=b: gone.txt: No such file or directory" in text
    assert "--lengths=1,x: not numbers with commas between" in text
    assert "--mesh=dat=2: not of the form data=2,tensor=4" in text
    assert [line.partition(":")[0] for line in lines[-3:]] == ["--context_length", "--batch_tokens", "--limit"]
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perplexity"], "perplexity: of which texts? give --corpus=NAME=PATH[:FIELD], one for each corpus"),
        (["needle", "--trials=0"], "--trials: 0 is too few; at least 1"),
        (["needle", "--depths=101"], "--depths: 101 is no percentage; 0 to 100"),
        (["needle", "--lengths=20"], "needle: 20 tokens have no room for needle and question"),
        (
            ["needle", "--lengths=1024"],
            "--lengths: 1,024 is longer than the context of 512 tokens; to try nevertheless",
        ),
        (["needle", "--lengths=100", "--stride=600"], "--stride: 600 would leave tokens out; at most the context, 512"),
        (["needle", "--lengths=200", "--chat"], "--chat: only tasks of lm-evaluation-harness ask questions"),
        (["needle", "--lengths=200", "--system=x"], "--system: it needs --chat"),
        (["needle", "--lengths=200", "--out=/dev/null"], "--out=/dev/null: it is no folder"),
        (["needle", "--lengths=200", "--mesh=data=0"], "--mesh: data: 0 devices cannot serve an axis"),
    ],
)
def test_a_mistake_has_its_line(capsys, arguments, message):
    (line,) = errors(capsys, *arguments)
    assert line.startswith(message)


def test_a_corpus_named_twice_is_a_mistake(corpora, capsys):
    (line,) = errors(capsys, "perplexity", corpora[0], corpora[0])
    assert line.endswith("there is a corpus 'first' already; give it another name")


def test_a_model_must_have_a_tokenizer_and_a_context_length(tiny_model, corpora, capsys):
    tiny_model.context_length = None
    (line,) = errors(capsys, "perplexity", *corpora)
    assert line == "--from=model: it does not say its context length; give --context_length=TOKENS"
    tiny_model.tokenizer = None
    (line,) = errors(capsys, "perplexity", *corpora)
    assert line == "tiny: there is no tokenizer in it, and all that is asked is text"
    tiny_model.tokenizer = TOKENIZER


@pytest.mark.slow
def test_a_run_of_ours_is_evaluated(tmp_path):
    tiny_run.write_corpus(tmp_path)
    tiny_run.finish(
        tiny_run.start(
            tiny_run.arguments(tmp_path, "run", run_stages="pretraining", stages__pretraining__tokens=20 * 8 * 64)
        )
    )
    command = [sys.executable, "-m", "lightning_jax.evaluate", "perplexity", f"--from={tmp_path / 'run'}"]
    command += [f"--corpus=text={tmp_path / 'text.jsonl'}", f"--out={tmp_path / 'out'}"]
    environment = os.environ | {"PYTHONPATH": str(tiny_run.REPOSITORY), "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    corpus = json.loads((tmp_path / "out" / "results.json").read_text())["perplexity"]["text"]
    assert corpus["asked"]["context_length"] == 64
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    # The same texts, in other windows.
    assert corpus["nats_per_token"] == pytest.approx(last["validation_loss"]["text"], rel=0.2)

    together = [*command[:-1], f"--out={tmp_path / 'together'}", "--mesh=data=2,fsdp=2"]
    first, second = on_two_hosts(together)
    assert "Perplexity by corpus" in first.output
    assert "written: " in first.error
    assert (second.output, second.error) == ("", "")
    together = json.loads((tmp_path / "together" / "results.json").read_text())["perplexity"]["text"]
    assert together["nats_per_token"] == pytest.approx(corpus["nats_per_token"], rel=1e-5)
