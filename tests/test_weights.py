"""A run's folder gives the weights, of adapters merged, of a reward model with its head: loaded, exported in blocks."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from saved_run import ADAPTERS, make_run

from lightning_jax import convert
from lightning_jax.checkpoints.state_tree import named_leaves
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline.chat_templates import TEMPLATES
from lightning_jax.models import HybridLM, RewardModel
from lightning_jax.trained_model import load_model
from lightning_jax.trained_reward_model import load_reward_model


@pytest.fixture
def run(tmp_path):
    """(folder of a run of adapters, the merged weights)."""
    return make_run(tmp_path, HybridLM, ADAPTERS)


def test_adapters_are_merged_where_a_run_is_loaded(run):
    folder, expected = run
    found = named_leaves(load_model(folder, say=print).params)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("block_elements", [1 << 20, 40])
def test_adapters_are_merged_where_a_run_is_exported(run, tmp_path, monkeypatch, block_elements):
    folder, expected = run
    monkeypatch.setattr("lightning_jax.import_export.BLOCK_ELEMENTS", block_elements)
    assert convert.main([f"--from={folder}", f"--to={tmp_path / 'exported'}"]) == 0
    found = named_leaves(load_model(tmp_path / "exported", say=print).params)
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-7)


def test_a_base_that_was_damaged_is_refused(run, tmp_path, capsys):
    folder, _ = run
    for file in (folder / "base" / "checkpoints" / "0" / "arrays" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert convert.main([f"--from={folder}", f"--to={tmp_path / 'exported'}"]) == 2
    assert str(folder / "base") in capsys.readouterr().err


@pytest.mark.parametrize("adapters", [(), ADAPTERS], ids=["weights", "adapters"])
def test_a_reward_model_is_exported_as_a_classifier_with_its_head(tmp_path, monkeypatch, capsys, adapters):
    monkeypatch.setattr("lightning_jax.import_export.BLOCK_ELEMENTS", 40)
    folder, expected = make_run(tmp_path, RewardModel, ("run_stages=reward_model", *adapters))
    assert convert.main([f"--from={folder}", f"--to={tmp_path / 'exported'}"]) == 0
    assert "the tokenizer has no token for padding" in capsys.readouterr().err
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    np.testing.assert_array_equal(tensors["score.weight"], expected["head/value"][None])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], expected["backbone/embedding/value"])
    queries = [tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].T for layer in range(3)]
    ours = expected["backbone/stacks/0/runs/0/mixer/query/value"]
    np.testing.assert_allclose(queries, ours.reshape(3, *ours.shape[-2:]), rtol=1e-6, atol=1e-7)
    fields = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    assert len(fields["id2label"]) == 1
    assert (tmp_path / "exported" / "chat_template.jinja").read_text() == TEMPLATES["tulu"]
    assert convert.main([f"--from={tmp_path / 'exported'}", f"--to={tmp_path / 'back'}"]) == 2
    assert "LlamaForSequenceClassification is a classifier; only language models are read" in capsys.readouterr().err
    with pytest.raises(UserError, match="a reward model; it scores chats"):
        load_model(folder, say=print)
    np.testing.assert_array_equal(load_reward_model(folder, say=print).params["head"][...], expected["head/value"])
