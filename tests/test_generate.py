"""The command that generates: where prompts come from, where completions go, and a line for each mistake."""

import io
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_run
from two_hosts import on_two_hosts

sys.path.append(str(pathlib.Path(__file__).parent / "generation"))
from tiny_generation import CONFIG, TOKENIZER, generator, params

from lightning_jax import generate
from lightning_jax.generation import Sampling
from lightning_jax.generation.generator import Generator

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
FEW = ("--max_new_tokens=5", "--temperature=0", "--slots=2")


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    model = SimpleNamespace(
        config=CONFIG,
        params=params(),
        mesh=generator().mesh,
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        special_tokens={"bos_token": "<s>"},
        context_length=64,
        eos_ids=(257,),
    )
    monkeypatch.setattr(generate, "load_model", lambda source, **options: model)
    return model


def completion(text, max_new_tokens=5):
    """The text that follows in greedy decoding."""
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0, stop_ids=(257,))
    (only,) = generator().generate([[256, *text.encode()]], sampling)
    return only.text


def run(*arguments):
    return generate.main(["--from=model", *FEW, *arguments])


def records(path):
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda each: (each["prompt"], each["sample"]))


def test_one_prompt_is_answered_on_the_console(capsys):
    assert run("--prompt=alpha") == 0
    output = capsys.readouterr()
    assert output.out == completion("alpha") + "\n"
    assert "1 of 1 completions; prompts " in output.err


def test_completions_of_a_file_of_prompts_are_written_as_lines_of_json(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "alpha"}\n{"prompt": "beta"}\n{"prompt": "c"}\n')
    out = tmp_path / "out.jsonl"
    assert run(f"--prompts={tmp_path / 'prompts.jsonl'}", f"--out={out}", "--samples=2", "--log_probs") == 0
    assert [(each["prompt"], each["sample"]) for each in records(out)] == [(p, s) for p in range(3) for s in range(2)]
    for each in records(out):
        assert each["text"] == completion(("alpha", "beta", "c")[each["prompt"]])
        assert each["tokens"] == len(each["ids"]) == len(each["log_probs"])
        assert each["finish_reason"] in ("length", "stop")
    assert capsys.readouterr().out == ""


def test_lines_of_standard_input_are_prompts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("alpha\nbeta\n"))
    assert run() == 0
    shown = capsys.readouterr().out
    for number, text in enumerate(("alpha", "beta")):
        assert f"--- prompt {number}, sample 0" in shown
        assert completion(text) in shown


def test_chats_are_rendered_by_the_models_template(tmp_path, capsys):
    assert run("--chat", "--system=Be brief.", "--prompt=hi") == 0
    sampling = Sampling(max_new_tokens=5, temperature=0, stop_ids=(257,))
    (expected,) = generator().generate([list(b"[system]Be brief.[user]hi[assistant]")], sampling)
    assert capsys.readouterr().out == expected.text + "\n"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + '{"prompt": "hi"}\n')
    out = tmp_path / "out.jsonl"
    assert run("--chat", f"--prompts={tmp_path / 'chats.jsonl'}", f"--out={out}") == 0
    (expected,) = generator().generate([list(b"[user]hi[assistant]yes?[assistant]")], sampling)
    assert records(out)[0]["text"] == expected.text


def test_an_interrupted_run_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    whole = Generator.generate

    def interrupted(self, *arguments, **options):
        for number, each in enumerate(whole(self, *arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(Generator, "generate", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nc\nd\n"))
    out = tmp_path / "out.jsonl"
    assert run(f"--out={out}") == 130
    assert len(records(out)) == 2
    assert f"stopped: 2 of 4 completions; they are in {out}; " in capsys.readouterr().err


def errors(capsys, *arguments):
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


def test_every_mistake_in_the_options_has_its_line(capsys):
    wrong = ("--temperature=-1", "--top_p=0", "--samples=0", "--slots=0", "--capacity=-5", "--system=x", "--log_probs")
    lines = errors(capsys, "--prompt=a", "--prompts=b", "--mesh=dat=2", *wrong)
    beginnings = [line.partition(":")[0].partition("=")[0] for line in lines]
    expected = ["temperature", "top_p", "samples", "slots", "capacity", "prompts", "system", "log_probs", "mesh"]
    assert sorted(beginnings) == sorted(f"--{name}" for name in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt="], "prompt 0: it is empty"),
        (["--prompt=alpha", "--capacity=8"], "prompt 0: its 6 tokens and max_new_tokens=5 exceed the capacity of 8"),
        (
            ["--prompt=a", "--stop_token=<|end|>"],
            "--stop_token=<|end|>: no special token of the model; known: <s>, </s>",
        ),
        (["--prompts=missing.jsonl"], "--prompts=missing.jsonl: No such file or directory"),
        (["--prompt=a", "--mesh=data=0"], "--mesh: data: 0 devices cannot serve an axis"),
        (["--prompt=a", "--mesh=data=-1,fsdp=-1"], "--mesh: fsdp: data takes all devices left over already"),
        (["--prompt=a", "--out=/nowhere/out.jsonl"], "--out=/nowhere/out.jsonl: there is no folder /nowhere"),
        (["--prompt=a", "--out=/"], "--out=/: it is a folder; name a file"),
        (["--prompt=a", "--out=/dev/full"], "--out=/dev/full: No space left on device"),
        (["--prompt=\ud800"], "prompt 0: it is not UTF-8"),
        (["--prompts=/"], "--prompts=/: Is a directory"),
        (["--prompts=/dev/null"], "--prompts=/dev/null: it holds no prompt"),
    ],
)
def test_a_mistake_has_its_line(capsys, arguments, message):
    (line,) = errors(capsys, *arguments)
    assert line.startswith(message)


def test_a_standard_input_without_text_has_its_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert errors(capsys) == ["standard input: it holds no prompt"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff\n"), "utf-8", "surrogateescape"))
    assert errors(capsys) == ["prompt 1: it is not UTF-8"]


def test_a_line_of_json_ends_where_json_says(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028line"}\n', encoding="utf-8")
    options = generate.parse(["--from=model", f"--prompts={path}"])
    assert generate.read_prompts(options) == ["one\u2028line"]


def test_every_line_of_a_file_that_is_no_prompt_is_named(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"text": "b"}\nnot json\n{"messages": [{"role": "user"}]}\n')
    lines = errors(capsys, f"--prompts={path}")
    assert [line.split(" is not")[0] for line in lines] == [f"--prompts={path}: line {n}" for n in (2, 3, 4)]


def test_a_model_without_chat_template_or_tokenizer_says_so(tiny_model, capsys):
    tiny_model.chat_template = None
    (line,) = errors(capsys, "--chat", "--prompt=a")
    assert line == "--chat: model has no chat template; leave --chat out, or take a chat model"
    tiny_model.tokenizer = None
    (line,) = errors(capsys, "--prompt=a")
    assert line == "--from=model: there is no tokenizer in it, and prompts are text"


@pytest.mark.slow
def test_a_run_of_ours_generates(tmp_path):
    tiny_run.write_corpus(tmp_path)
    tiny_run.finish(tiny_run.start(tiny_run.arguments(tmp_path, "run", run_stages="pretraining")))
    command = [sys.executable, "-m", "lightning_jax.generate", f"--from={tmp_path / 'run'}", "--prompt=alpha ", *FEW]
    environment = os.environ | {"PYTHONPATH": str(tiny_run.REPOSITORY), "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 1

    first, second = on_two_hosts([*command, "--mesh=fsdp=4"])
    assert first.output == done.stdout
    assert "1 of 1 completions" in first.error
    assert (second.output, second.error) == ("", "")
    for said in on_two_hosts(command, code=2):
        assert said.error.splitlines()[-1].endswith(
            "--mesh: it must say how 2 hosts share the model, as --mesh=fsdp=-1 does"
        )
    for said in on_two_hosts([*command, "--mesh=fsdp=4"], second=["--temperature=1"], code=2):
        assert "differs: --temperature is 1.0, and 0.0 elsewhere" in said.error
