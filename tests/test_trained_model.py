"""A trained model is the same from whichever folder and over whichever devices it is loaded."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import released_models
import tiny_run
from flax import nnx

from lightning_jax import convert, train
from lightning_jax.checkpoints import safetensors_folder
from lightning_jax.errors import UserError
from lightning_jax.parallel import MeshConfig
from lightning_jax.trained_model import load_model

FEW = ("--max_new_tokens=4", "--temperature=0", "--slots=1")
STAGES = {"pretraining": 64, "context_extension": 128}
FIELDS = released_models.RELEASED | {"num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model as a Hugging Face folder and as one of ours."""
    path = tmp_path_factory.mktemp("models")
    released_models.write(path / "theirs", FIELDS, released_models.weights(FIELDS), shards=2)
    assert convert.main([f"--from={path / 'theirs'}", f"--to={path / 'ours'}"]) == 0
    return path


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


def test_both_folders_give_the_same_model(folders):
    theirs, ours = (load_model(folders / name, say=print) for name in ("theirs", "ours"))
    assert equal(theirs.params, ours.params)
    assert theirs.config == ours.config
    assert (theirs.name, theirs.step, ours.name, ours.step) == ("theirs", None, "ours", 0)
    for model in (theirs, ours):
        assert model.context_length == FIELDS["max_position_embeddings"]
        assert model.eos_ids == (2, 5)
        assert (model.tokenizer.bos_id, model.tokenizer.eos_id) == (1, 2)
        assert model.chat_template == released_models.TEMPLATE
        assert model.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
        assert model.mesh.size == 1


@pytest.mark.parametrize("name", ["theirs", "ours"])
def test_eight_devices_hold_the_same_model_in_parts(folders, name):
    one = load_model(folders / name, say=print)
    eight = load_model(folders / name, mesh=MeshConfig.of(fsdp=2, tensor=4), say=print)
    assert equal(one.params, eight.params)
    embedding = eight.params["embedding"].get_value()
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(48 // 4, 16 // 2)}
    tokens = np.random.default_rng(0).integers(0, 48, (2, 20))

    def logits(model):
        def forward(params):
            merged = nnx.merge(model.graphdef, params)
            return merged.logits(merged(tokens, segment_ids_BT=np.ones_like(tokens))[0])

        return np.asarray(jax.jit(forward)(model.params))

    expected = logits(one)
    np.testing.assert_allclose(logits(eight), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_device_reads_only_the_rows_that_it_holds(folders, monkeypatch):
    read, elements = safetensors_folder.Tensor.read, []

    def counted(self, *arguments):
        block = read(self, *arguments)
        elements.append(block.size)
        return block

    monkeypatch.setattr(safetensors_folder.Tensor, "read", counted)
    eight = load_model(folders / "theirs", mesh=MeshConfig.of(fsdp=2, tensor=4), say=print)
    shards = [shard.data.size for leaf in jax.tree.leaves(eight.params) for shard in leaf.addressable_shards]
    assert sum(elements) <= sum(shards)


def test_the_compute_dtype_can_be_chosen_and_float16_widens(folders, tmp_path):
    assert load_model(folders / "ours", compute_dtype="bfloat16", say=print).config.compute_dtype == "bfloat16"
    fields = released_models.LLAMA
    narrow = load_model(
        released_models.write(tmp_path / "bf16", fields, released_models.weights(fields, "bfloat16")), say=print
    )
    assert (narrow.config.param_dtype, narrow.config.compute_dtype) == ("bfloat16", "bfloat16")
    half = released_models.write(tmp_path / "f16", fields, released_models.weights(fields, "float16"))
    assert load_model(half, say=print).config.param_dtype == "float32"


@pytest.mark.parametrize("name", ["theirs", "ours"])
def test_a_folder_may_be_named_from_the_working_directory(folders, monkeypatch, name):
    monkeypatch.chdir(folders)
    assert load_model(name, say=print).name == name


def test_what_cannot_be_loaded_has_its_line(folders, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "nothing", say=print)
    with pytest.raises(UserError, match="needs 3 devices, 8 were found"):
        load_model(folders / "ours", mesh=MeshConfig.of(data=3), say=print)
    with pytest.raises(UserError, match="does not divide over mesh axis tensor=8"):
        load_model(folders / "theirs", mesh=MeshConfig.of(tensor=8), say=print)


@pytest.mark.slow
def test_a_run_is_loaded_with_the_rotary_base_of_its_stage_and_generates(tmp_path):
    tiny_run.write_corpus(tmp_path)
    mesh = {f"mesh.{axis}": size for axis, size in (("data", 8), ("fsdp", 1), ("expert", 1), ("tensor", 1))}
    stages = {f"stages.{stage}.tokens": 8 * context * 2 for stage, context in STAGES.items()}
    for stage in STAGES:
        stages |= {f"stages.{stage}.schedule.warmup_steps": 0, f"stages.{stage}.schedule.decay_steps": 0}
    arguments = tiny_run.arguments(tmp_path, "run", **mesh, **stages, checkpoints__every_steps=1)
    assert train.main([*arguments, "--config.stages.context_extension.rope_theta=123456.0"]) == 0
    model = load_model(tmp_path / "run", say=print)
    assert (model.step, model.config.rope_theta, model.context_length) == (4, 123456.0, 128)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "4" / "MANIFEST.json").write_text("{}")
    said = []
    model = load_model(tmp_path / "run", say=said.append)
    assert (model.step, said) == (3, ["checkpoint 4 rejected: MANIFEST.json is not readable"])
    done = subprocess.run(
        [sys.executable, "-m", "lightning_jax.generate", f"--from={tmp_path / 'run'}", "--prompt=alpha ", *FEW],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 completions" in done.stderr
