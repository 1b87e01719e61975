"""A run's folder with adapters gives the merged weights: loaded, and exported block by block."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from lightning_jax import convert
from lightning_jax.checkpoints import CheckpointConfig, Checkpoints
from lightning_jax.checkpoints.state_tree import named_leaves
from lightning_jax.config_reader import load_config
from lightning_jax.models import HybridLM, lora
from lightning_jax.trained_model import load_model
from lightning_jax.weights import save_params

OVERRIDES = (
    "model.vocab_size=257",
    "model.hidden_size=16",
    "model.num_layers=3",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=8",
    "model.rotary_dim=8",
    "model.intermediate_size=24",
    "data.tokenizer.kind=bytes",
    "data.tokenizer.vocab_size=257",
    "stages.sft.tokens=8192",
    "stages.sft.passes=none",
    "stages.dpo.tokens=8192",
    "stages.dpo.passes=none",
    "lora.rank=2",
    "lora.alpha=3",
    "lora.targets=mixer.query,mixer.output,feed_forward.up",
)


@pytest.fixture
def run(tmp_path):
    """(folder of a run of adapters, the merged weights)."""
    config = load_config("configs/tulu3.py:laptop", [*OVERRIDES, f"data.cache_dir={tmp_path / 'cache'}"])
    model = HybridLM(config.model, rngs=nnx.Rngs(0))
    base = nnx.state(model, nnx.Param)
    lora.adapt(model, config.lora, rngs=nnx.Rngs(1))
    trained, frozen = lora.split(nnx.state(model, nnx.Param))
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
    folder = tmp_path / "run"
    save_params(folder / "base", base, {"model": json.loads(config.to_json())["model"]})
    with Checkpoints(folder / "checkpoints", CheckpointConfig(0, 0.0, 1, 0, 1)) as checkpoints:
        checkpoints.save(1, {"params": trained}, {"config": json.loads(config.to_json())}, wait=True)
    return folder, named_leaves(lora.merged(nnx.merge_state(trained, frozen), config.lora))


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
