"""Damaged and hostile inputs: each has its line, nothing runs, and nothing is left behind."""

import json
import os
import struct

import numpy as np
import pytest
import released_models
from released_models import LLAMA, RELEASED, write_tokenizer
from safetensors.numpy import load_file, save_file

from lightning_jax import convert, generate
from lightning_jax.input_pipeline import chat_template


def run(source, target, *more):
    return convert.main([f"--from={source}", f"--to={target}", *more])


def change_config(**changes):
    def damage(folder):
        fields = json.loads((folder / "config.json").read_text()) | changes
        fields = {name: value for name, value in fields.items() if value != "delete"}
        (folder / "config.json").write_text(json.dumps(fields))

    return damage


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-5])


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(**files):
    def damage(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    return damage


Q = "model.layers.0.self_attn.q_proj.weight"


def several(tensors):
    tensors["extra.weight"] = np.zeros(3, np.float32)
    tensors[Q] = np.zeros((3, 16), np.float32)
    del tensors["lm_head.weight"]


DAMAGES = {
    "no folder": (lambda folder: folder.rename(folder.with_name("x")), ["no such folder"]),
    "an empty folder": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        ["neither a run (checkpoints/) nor"],
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json: missing"]),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json: not JSON"]),
    "another architecture": (change_config(model_type="gpt2"), ["model_type: 'gpt2' is no architecture of ours"]),
    "fields of other types": (
        change_config(model_type=["llama"]),
        ["config.json: model_type: ['llama'] is no architecture of ours"],
    ),
    "rope of another type": (
        change_config(rope_parameters="default"),
        ["config.json: rope_parameters: 'default' is str; it should be a dict"],
    ),
    "fields missing": (
        change_config(hidden_size="delete", vocab_size="many"),
        ["config.json: vocab_size: 'many' is wrong; it should be a number", "config.json: hidden_size: missing"],
    ),
    "unsupported": (
        change_config(attention_bias=True, quantization_config={"bits": 4}, rope_scaling={"rope_type": "yarn"}),
        ["attention_bias: True", "quantization_config: {'bits': 4}", "rope_scaling: rope_type 'yarn'"],
    ),
    "impossible sizes": (change_config(num_key_value_heads=3), ["num_kv_heads: 3 does not divide num_heads=4"]),
    "tensors": (
        change_tensors(several),
        [
            "tensor extra.weight [3] is unexpected",
            "tensor lm_head.weight is missing; it should be [48, 16]",
            f"tensor {Q} is [3, 16]; it should be [32, 16]",
        ],
    ),
    "wrong dtype": (
        change_tensors(lambda tensors: tensors.update({Q: np.zeros((32, 16), np.int64)})),
        [f"tensor {Q} is I64; weights are F32, BF16, F16"],
    ),
    "truncated": (truncate, ["it is truncated"]),
    "pickle": (pickle_only, ["pytorch_model.bin is a pickle, which runs code when it is read"]),
    "index leads out": (index(a="../../etc/passwd"), ["'../../etc/passwd' is no safetensors file of the folder"]),
    "missing shard": (index(a="model-2.safetensors"), ["model-2.safetensors: missing"]),
    "index not JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        ["not an index; it should be a JSON object with a weight_map"],
    ),
    "large tokenizer": (
        lambda folder: write_tokenizer(folder, 60),
        ["the tokenizer has 60 tokens, more than the model's vocab_size=48"],
    ),
    "tokenizer not JSON": (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["not a tokenizer.json"]),
    "tokenizer config not JSON": (
        lambda folder: (folder / "tokenizer_config.json").write_text("["),
        ["tokenizer_config.json: not JSON"],
    ),
    "config nested without end": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        ["config.json: not JSON"],
    ),
    "header nested without end": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 90_000) + b"[" * 90_000),
        ["model.safetensors: its header is not JSON"],
    ),
    "index nested without end": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 100_000),
        ["not an index; it should be a JSON object with a weight_map"],
    ),
    "names that write lines": (
        change_tensors(lambda tensors: tensors.update({"a\nerror: \x1b[31m": np.zeros(3, np.float32)})),
        [r"tensor 'a\nerror: \x1b[31m' has characters that cannot be printed"],
    ),
    "a pipe instead of a shard": (
        lambda folder: [index(a="model-2.safetensors")(folder), os.mkfifo(folder / "model-2.safetensors")],
        ["model-2.safetensors: not a file"],
    ),
    "text file leads out": (
        lambda folder: (folder / "merges.txt").symlink_to(__file__),
        ["merges.txt: a link to "],
    ),
    "template not text": (
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff\xfe"),
        ["chat_template.jinja: not UTF-8 text"],
    ),
    "eos is no token": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [2, 48]}'),
        ["eos_token_id 48 is not in the vocabulary of 48"],
    ),
    "eos is no number": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        ["eos_token_id '</s>' is no token id"],
    ),
    "target cannot be made": (
        lambda folder: (folder.parent / "run.converting").write_text(""),
        ["run.converting: File exists"],
    ),
    "a run without checkpoint": (
        lambda folder: (folder / "checkpoints").mkdir(),
        ["there is no whole checkpoint in"],
    ),
    "target exists": (
        lambda folder: (folder.parent / "run" / "x").mkdir(parents=True),
        ["run: it exists already; name a new folder"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_hostile_has_its_line(tmp_path, damage, capsys):
    folder = released_models.write(tmp_path / "theirs", LLAMA, released_models.weights(LLAMA))
    change, messages = DAMAGES[damage]
    change(folder)
    assert run(folder, tmp_path / "run") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("error: ")
        assert message in line
    assert not (tmp_path / "run" / "checkpoints").exists()


TEMPLATES = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "not done after"),
    "reaches for attributes": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "line 1: access to attribute '__class__' of 'str' object is unsafe",
    ),
    "reads files": ("{% include '/etc/passwd' %}", "no loader for this environment"),
    "fills memory": ("{{ 'a' * 10 ** 10 }}", "line 1: out of memory"),
    "is no template": ("text\n{% if %}", "line 2: Expected an expression"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_has_its_line(tmp_path, name, monkeypatch, capsys):
    if name == "loops":
        monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    folder = released_models.write(tmp_path / "theirs", LLAMA, released_models.weights(LLAMA))
    template, message = TEMPLATES[name]
    (folder / "chat_template.jinja").write_text(template)
    assert generate.main([f"--from={folder}", "--chat", "--prompt=abc"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: chat template: ")
    assert message in line


def test_differing_scales_of_sub_layers_are_refused_by_name(tmp_path, capsys):
    fields = RELEASED | {"layernorm_mlp_alpha": 2.0, "attn_type_list": [0, 0, 1, 0, 7]}
    folder = released_models.write(tmp_path / "theirs", fields, released_models.weights(RELEASED))
    assert run(folder, tmp_path / "run") == 2
    errors = capsys.readouterr().err
    assert "attn_type_list: not 0 or 1 for each of 5 layers" in errors
    assert "layernorm_mlp_alpha=2: they differ" in errors


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capsys):
    released_models.write(tmp_path / "theirs", LLAMA, released_models.weights(LLAMA))
    assert run(tmp_path / "theirs", tmp_path / "run") == 0
    files = [path for path in (tmp_path / "run/checkpoints/0/arrays/d").iterdir() if path.is_file()]
    large = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 1
    large.write_bytes(content)
    step = tmp_path / "run/checkpoints/0"
    manifest = json.loads((step / "MANIFEST.json").read_text())
    small = manifest["files"][str(large.relative_to(step))]["crc32"] is not None
    assert run(tmp_path / "run", tmp_path / "back") == 2
    errors = capsys.readouterr().err
    assert (
        f"checkpoint 0 cannot be used: file {large.relative_to(step)} was altered" if small else "fingerprint"
    ) in errors
    assert not (tmp_path / "back").exists()
