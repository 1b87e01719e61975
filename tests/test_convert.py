"""Converting: bit-exact there and back, whole or not there, and a line for everything that is wrong."""

import json
import os
import shutil
import struct

import jax
import numpy as np
import pytest
import released_models
import tiny_run
from released_models import CONFIGS, LLAMA, PORT, RELEASED, write_tokenizer
from safetensors.numpy import load_file, save_file

from lightning_jax import convert, import_export, train
from lightning_jax.checkpoints import CheckpointConfig, Checkpoints
from lightning_jax.checkpoints.fingerprint import block_sums
from lightning_jax.trained_model import load_model


def run(source, target, *more):
    return convert.main([f"--from={source}", f"--to={target}", *more])


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_bytes(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_bit_exact(tmp_path, name, dtype, monkeypatch):
    monkeypatch.setattr(import_export, "BLOCK_ELEMENTS", 70)  # several blocks to a tensor, the last one smaller
    fields, tensors = CONFIGS[name], released_models.weights(CONFIGS[name], dtype)
    released_models.write(tmp_path / "theirs", fields, tensors, shards=3)
    assert run(tmp_path / "theirs", tmp_path / "run") == 0
    assert run(tmp_path / "run", tmp_path / "back") == 0
    assert_equal_bytes(tensors_in(tmp_path / "back"), tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written.get(key) for key in fields if key != "torch_dtype"} == {
        key: value for key, value in fields.items() if key != "torch_dtype"
    }
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_fused_experts_are_read_and_written_apart(tmp_path):
    apart = released_models.weights(PORT)
    fused = {name.replace("block_sparse_moe", "mlp"): t for name, t in apart.items() if ".experts." not in name}
    for layer in range(PORT["num_hidden_layers"]):
        there = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.{{}}.weight".format
        w1, w2, w3 = (np.stack([apart[there(e, w)] for e in range(4)]) for w in ("w1", "w2", "w3"))
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    released_models.write(tmp_path / "fused", PORT, fused)
    assert run(tmp_path / "fused", tmp_path / "run") == 0
    assert run(tmp_path / "run", tmp_path / "apart") == 0
    assert_equal_bytes(tensors_in(tmp_path / "apart"), apart)


def test_the_dtype_can_be_chosen_and_the_routers_stay_float32(tmp_path):
    tensors = released_models.weights(RELEASED, "bfloat16")
    released_models.write(tmp_path / "theirs", RELEASED, tensors)
    assert run(tmp_path / "theirs", tmp_path / "run", "--dtype=float32") == 0
    assert load_model(tmp_path / "run", say=print).config.param_dtype == "float32"
    assert run(tmp_path / "run", tmp_path / "wide") == 0
    assert_equal_bytes(tensors_in(tmp_path / "wide"), {k: v.astype(np.float32) for k, v in tensors.items()})
    assert run(tmp_path / "run", tmp_path / "narrow", "--dtype=bfloat16") == 0
    assert_equal_bytes(tensors_in(tmp_path / "narrow"), tensors)


def test_a_checkpoint_that_training_saved_is_exported(tmp_path):
    tensors = released_models.weights(RELEASED)
    released_models.write(tmp_path / "theirs", RELEASED, tensors)
    assert run(tmp_path / "theirs", tmp_path / "run") == 0
    model = load_model(tmp_path / "run", say=print)
    metadata = json.loads((tmp_path / "run/checkpoints/0/MANIFEST.json").read_text())["metadata"]
    with Checkpoints(tmp_path / "saved" / "checkpoints", CheckpointConfig(1, 0, 1, 0, 1)) as checkpoints:
        checkpoints.save(7, {"params": model.params}, metadata, wait=True)
    assert run(tmp_path / "saved", tmp_path / "back", "--names=released") == 0
    assert_equal_bytes(tensors_in(tmp_path / "back"), tensors)


class Killed(Exception):
    """As if the process had been killed."""


def interrupt_after(blocks, monkeypatch):
    """Kills the conversion after so many blocks; the places of those that it did."""
    real, done = block_sums, []

    def until(block, start):
        if len(done) == blocks:
            raise Killed
        done.append(start)
        return real(block, start)

    monkeypatch.setattr(import_export, "block_sums", until)
    return done


@pytest.mark.parametrize("direction", ["import", "export"])
def test_an_interrupted_conversion_goes_on_and_is_not_there_until_it_is_whole(tmp_path, direction, monkeypatch, capsys):
    tensors = released_models.weights(RELEASED)
    source, target = released_models.write(tmp_path / "theirs", RELEASED, tensors), tmp_path / "target"
    if direction == "export":
        assert run(source, tmp_path / "run") == 0
        source = tmp_path / "run"
    done = interrupt_after(40, monkeypatch)
    monkeypatch.setattr(import_export, "SYNC_ELEMENTS", 1000)
    with pytest.raises(Killed):
        run(source, target)
    assert not target.exists()
    working = tmp_path / "target.converting"
    recorded = len(json.loads((working / "journal.json").read_text())["sums"])
    assert 20 < recorded < 40
    done = interrupt_after(10**9, monkeypatch)
    capsys.readouterr()
    assert run(source, target) == 0
    assert f"going on after {recorded} of " in capsys.readouterr().err
    assert len(done) == len(tensors) - recorded
    assert not working.exists()
    if direction == "import":
        assert run(target, tmp_path / "back") == 0
        target = tmp_path / "back"
    assert_equal_bytes(tensors_in(target), tensors)


def oldest_of_weights(working):
    files = [file for file in working.rglob("*") if file.suffix == ".safetensors" or file.parent.name == "d"]
    return min(files, key=lambda file: file.stat().st_mtime_ns)


def lose_a_file(working):
    oldest_of_weights(working).unlink()


def cut_a_file(working):
    os.truncate(oldest_of_weights(working), 100)


def lose_all_but_the_journal(working):
    for path in working.iterdir():
        if path.name != "journal.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage_the_journal(working):
    (working / "journal.json").write_text('{"identity": "')


@pytest.mark.parametrize("damage", [lose_a_file, cut_a_file, lose_all_but_the_journal, damage_the_journal])
@pytest.mark.parametrize("direction", ["import", "export"])
def test_an_interrupted_conversion_that_lost_files_starts_over(tmp_path, direction, damage, monkeypatch, capsys):
    tensors = released_models.weights(LLAMA)
    source, target = released_models.write(tmp_path / "theirs", LLAMA, tensors), tmp_path / "target"
    if direction == "export":
        assert run(source, tmp_path / "run") == 0
        source = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(import_export, "SYNC_ELEMENTS", 1000)
        interrupt_after(10, patch)
        with pytest.raises(Killed):
            run(source, target)
    damage(tmp_path / "target.converting")
    capsys.readouterr()
    assert run(source, target) == 0
    assert "going on" not in capsys.readouterr().err
    if direction == "import":
        assert run(target, tmp_path / "back") == 0
        target = tmp_path / "back"
    assert_equal_bytes(tensors_in(target), tensors)


def test_what_is_left_of_another_conversion_is_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr(import_export, "SYNC_ELEMENTS", 1000)
    for seed in (0, 1):
        released_models.write(tmp_path / f"theirs{seed}", LLAMA, released_models.weights(LLAMA, seed=seed))
    real = import_export._copy_texts
    monkeypatch.setattr(import_export, "_copy_texts", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(tmp_path / "theirs0", tmp_path / "run")
    monkeypatch.setattr(import_export, "_copy_texts", real)
    assert run(tmp_path / "theirs1", tmp_path / "run") == 0
    assert run(tmp_path / "run", tmp_path / "back") == 0
    assert_equal_bytes(tensors_in(tmp_path / "back"), released_models.weights(LLAMA, seed=1))


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


def test_models_that_no_architecture_computes_are_not_exported(tmp_path, capsys):
    released_models.write(tmp_path / "theirs", LLAMA, released_models.weights(LLAMA))
    assert run(tmp_path / "theirs", tmp_path / "run") == 0
    assert run(tmp_path / "run", tmp_path / "back", "--names=released") == 2
    assert "--names: only MiniMax has other names than one" in capsys.readouterr().err


@pytest.mark.slow
def test_training_starts_from_an_imported_model_and_its_run_is_exported(tmp_path):
    fields = RELEASED | {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rotary_dim": 8,
        "attn_type_list": [0, 0, 1], "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = released_models.weights(fields, "bfloat16")
    released_models.write(tmp_path / "theirs", fields, tensors)
    assert run(tmp_path / "theirs", tmp_path / "imported", "--dtype=float32") == 0
    tiny_run.write_corpus(tmp_path)
    settings = {"run_stages": "pretraining", "stages.pretraining.tokens": 8 * 64 * 2}
    settings |= {"stages.pretraining.schedule.warmup_steps": 0, "stages.pretraining.schedule.decay_steps": 0}
    arguments = tiny_run.arguments(tmp_path, "run", **settings)
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in (("data", 8), ("fsdp", 1), ("expert", 1), ("tensor", 1))]
    assert train.main([*arguments, *mesh, f"--init_from={tmp_path / 'imported'}"]) == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    before = load_model(tmp_path / "imported", say=print).params
    after = load_model(tmp_path / "run", say=print)
    assert after.step == 2
    close = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() < 0.1), before, after.params)
    assert all(jax.tree.leaves(close))
    assert run(tmp_path / "run", tmp_path / "back", "--names=released") == 0
    assert {name: tensor.shape for name, tensor in tensors_in(tmp_path / "back").items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).exists()
