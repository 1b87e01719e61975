"""The folder of a run as training would have left it, without the training."""

import json
import pathlib

import jax
import numpy as np
from flax import nnx

from lightning_jax.checkpoints import CheckpointConfig, Checkpoints
from lightning_jax.checkpoints.state_tree import named_leaves
from lightning_jax.config_reader import load_config
from lightning_jax.models import HybridLM, RewardModel, lora
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
    "stages.reward_model.tokens=8192",
    "stages.reward_model.passes=none",
)
ADAPTERS = ("lora.rank=2", "lora.alpha=3", "lora.targets=mixer.query,mixer.output,feed_forward.up")


def make_run(
    tmp_path: pathlib.Path, kind: type[HybridLM | RewardModel], overrides: tuple[str, ...] = ()
) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """(folder of a run, the weights that it stands for); of adapters these are merged."""
    config = load_config("configs/tulu3.py:laptop", [*OVERRIDES, *overrides, f"data.cache_dir={tmp_path / 'cache'}"])
    model, folder = kind(config.model, rngs=nnx.Rngs(0)), tmp_path / "run"
    trained = weights = nnx.state(model, nnx.Param)
    if config.lora:
        lora.adapt(model, config.lora, rngs=nnx.Rngs(1))
        trained, frozen = lora.split(nnx.state(model, nnx.Param))
        trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), trained)
        weights = lora.merged(nnx.merge_state(trained, frozen), config.lora)
        base = lora.plain_of(frozen, config.lora)
        save_params(folder / "base", base, {"model": json.loads(config.to_json())["model"]})
    with Checkpoints(folder / "checkpoints", CheckpointConfig(0, 0.0, 1, 0, 1)) as checkpoints:
        checkpoints.save(1, {"params": trained}, {"config": json.loads(config.to_json())}, wait=True)
    return folder, named_leaves(weights)
