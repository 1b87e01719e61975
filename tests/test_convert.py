"""Converting: bit-exact there and back, whole or not there, and a line for everything that is wrong."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import released_models
import tiny_run
from released_models import CONFIGS, LLAMA, PORT, RELEASED
from safetensors.numpy import load_file

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
    """As if the process had been killed: nothing is written any more."""


def kill(monkeypatch):
    monkeypatch.setattr(import_export.Journal, "write", lambda journal: None)
    raise Killed


def interrupt_after(blocks, monkeypatch, interrupt=kill):
    """Ends the conversion after so many blocks; the places of those that it did."""
    real, done = block_sums, []

    def until(block, start):
        if len(done) == blocks:
            interrupt(monkeypatch)
        done.append(start)
        return real(block, start)

    monkeypatch.setattr(import_export, "block_sums", until)
    return done


def prepared(folder, fields, direction):
    """Weights, the folder to convert in a direction and the one to make of it."""
    tensors = released_models.weights(fields)
    source = released_models.write(folder / "theirs", fields, tensors)
    if direction == "export":
        assert run(source, folder / "run") == 0
        source = folder / "run"
    return tensors, source, folder / "target"


def assert_converted(folder, target, direction, tensors):
    if direction == "import":
        assert run(target, folder / "back") == 0
        target = folder / "back"
    assert_equal_bytes(tensors_in(target), tensors)


@pytest.fixture
def _heeds_ctrl_c():
    """A shell's background jobs are born ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_goes_on(folder, direction, tensors, source, target, monkeypatch, capsys):
    """The same command does what is not on record, and only that; how much is."""
    assert not target.exists()
    recorded = len(json.loads((folder / "target.converting" / "journal.json").read_text())["sums"])
    done = interrupt_after(10**9, monkeypatch)
    capsys.readouterr()
    assert run(source, target) == 0
    assert f"going on after {recorded} of " in capsys.readouterr().err
    assert len(done) == len(tensors) - recorded
    assert not (folder / "target.converting").exists()
    assert_converted(folder, target, direction, tensors)
    return recorded


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_killed_conversion_goes_on_and_is_not_there_until_it_is_whole(tmp_path, direction, monkeypatch, capsys):
    tensors, source, target = prepared(tmp_path, RELEASED, direction)
    with monkeypatch.context() as patch:
        patch.setattr(import_export, "SYNC_ELEMENTS", 1000)
        interrupt_after(40, patch)
        with pytest.raises(Killed):
            run(source, target)
    assert 20 < assert_goes_on(tmp_path, direction, tensors, source, target, monkeypatch, capsys) < 40


@pytest.mark.usefixtures("_heeds_ctrl_c")
@pytest.mark.parametrize("direction", ["import", "export"])
def test_ctrl_c_is_one_line_and_loses_nothing(tmp_path, direction, monkeypatch, capsys):
    tensors, source, target = prepared(tmp_path, RELEASED, direction)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupt_after(40, patch, lambda _: signal.raise_signal(signal.SIGINT))
        assert run(source, target) == 130
    *caveats, line = capsys.readouterr().err.splitlines()
    assert line == "stopped; the same command goes on from there"
    assert len(caveats) == (direction == "export")
    assert assert_goes_on(tmp_path, direction, tensors, source, target, monkeypatch, capsys) == 40


@pytest.mark.usefixtures("_heeds_ctrl_c")
@pytest.mark.parametrize(("direction", "then"), [("import", "copy_texts"), ("export", "write_texts")])
def test_ctrl_c_after_the_last_tensor_loses_nothing(tmp_path, direction, then, monkeypatch, capsys):
    tensors, source, target = prepared(tmp_path, RELEASED, direction)
    with monkeypatch.context() as patch:
        patch.setattr(import_export, then, lambda *_: signal.raise_signal(signal.SIGINT))
        assert run(source, target) == 130
    recorded = assert_goes_on(tmp_path, direction, tensors, source, target, monkeypatch, capsys)
    assert recorded == len(tensors)


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
    tensors, source, target = prepared(tmp_path, LLAMA, direction)
    with monkeypatch.context() as patch:
        patch.setattr(import_export, "SYNC_ELEMENTS", 1000)
        interrupt_after(10, patch)
        with pytest.raises(Killed):
            run(source, target)
    damage(tmp_path / "target.converting")
    capsys.readouterr()
    assert run(source, target) == 0
    assert "going on" not in capsys.readouterr().err
    assert_converted(tmp_path, target, direction, tensors)


def test_what_is_left_of_another_conversion_is_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr(import_export, "SYNC_ELEMENTS", 1000)
    for seed in (0, 1):
        released_models.write(tmp_path / f"theirs{seed}", LLAMA, released_models.weights(LLAMA, seed=seed))
    with monkeypatch.context() as patch:
        patch.setattr(import_export, "copy_texts", lambda *_: kill(patch))
        with pytest.raises(Killed):
            run(tmp_path / "theirs0", tmp_path / "run")
    assert run(tmp_path / "theirs1", tmp_path / "run") == 0
    assert run(tmp_path / "run", tmp_path / "back") == 0
    assert_equal_bytes(tensors_in(tmp_path / "back"), released_models.weights(LLAMA, seed=1))


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
