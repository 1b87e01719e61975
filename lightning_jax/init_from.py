"""How a run begins with the weights of another one, and a value model with those of a reward model or of the policy."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from lightning_jax.checkpoints import newest_manifest
from lightning_jax.checkpoints.state_tree import named_leaves, rebuild
from lightning_jax.config import ConfigError, RunConfig
from lightning_jax.model_folders import BASE, CHECKPOINTS
from lightning_jax.models import HybridLM, RewardModel, lora
from lightning_jax.programs import Programs
from lightning_jax.stages import Stage
from lightning_jax.stored_config import to_store
from lightning_jax.train_step import TrainState
from lightning_jax.weights import restore_params, restore_weights, save_params

Say = Callable[[str], None]


def begin_with(
    source: Path, state: TrainState, run: Path, config: RunConfig, programs: Programs, say: Say
) -> TrainState:
    """The state with the weights of another run; a reward model may begin as a language model.

    Where adapters are trained the weights go into the folder of the run and to `programs`, and the adapters are new.

    Args:
        source: folder of the other run; of adapters that it has none are left.
        state: a new one.
        run: folder of this run.

    Raises:
        UserError: there is no checkpoint, none verifies, or they are of another model.
    """
    manifest = newest_manifest(source / CHECKPOINTS)
    if manifest is None:
        released = any(source.glob("*.safetensors"))
        hint = f"; python -m lightning_jax.convert --from={source} --to=FOLDER makes one of its weights" * released
        raise ConfigError([f"--init_from={source}: there is no checkpoint in this folder{hint}"])
    has_head = programs.kind is RewardModel and any(path.startswith("params/backbone/") for path in manifest.leaves)
    kind = RewardModel if has_head else HybridLM
    weights, step = restore_weights(source, config.model, programs.mesh, kind=kind, say=say)
    say(f"parameters from step {step} of {source}")
    leaves = named_leaves(weights if kind is programs.kind else nnx.State({"backbone": weights}))
    if config.lora:
        base = rebuild(lora.plain_of(programs.abstract_frozen[0], config.lora), leaves)
        save_params(run / BASE, base, to_store(config.model))
        freeze_base(run, config, programs, say)
    own = named_leaves(state.params)
    return state._replace(params=rebuild(state.params, own | {path: leaves.get(path, own[path]) for path in own}))


def begin_value(state: TrainState, stage: Stage, programs: Programs, say: Say) -> TrainState:
    """The state with the value model as a stage begins: of a reward model, or of the policy with a new head.

    Raises:
        UserError: the folder that the stage names has no whole reward model of this size.
    """
    value = programs.first_value()
    if folder := stage.config.value.reward_model:
        weights, step = restore_weights(Path(folder), programs.value.model, programs.mesh, kind=RewardModel, say=say)
        say(f"stage {stage.name}: the value model begins as the reward model of step {step} of {folder}")
    else:
        weights = nnx.State({"backbone": jax.tree.map(jnp.copy, programs.merged(state.params))})
        say(f"stage {stage.name}: the value model begins as the policy, with a new head")
    own = named_leaves(value.params)
    params = rebuild(value.params, own | named_leaves(weights))
    return state._replace(value=value._replace(step=jnp.copy(state.step), params=params))


def freeze_base(run: Path, config: RunConfig, programs: Programs, say: Say) -> None:
    """Puts the weights that a run's adapters belong to, as its folder has them, where its steps find them."""
    base = lora.plain_of(programs.abstract_frozen[0], config.lora)
    weights, _ = restore_params(run / BASE, base, say=say)
    programs.frozen = (lora.frozen_of(weights, config.lora),)
