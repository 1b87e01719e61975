"""A live reference: the weights that the stage began with, which score every batch.

Of a run that trains adapters it is another set of these: both models share the weights that are frozen. A run that goes
on in the middle of the stage finds it in its folder.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lightning_jax.model_folders import ModelFolderError
from lightning_jax.objectives.preference import REFERENCE
from lightning_jax.references.running_stage import Key, RunningStage, fingerprint_of
from lightning_jax.train_step import Batch
from lightning_jax.weights import restore_params, save_params


def live_reference(params: nnx.State, running: RunningStage) -> tuple[Callable[[Batch], Batch], Key]:
    """What adds to a batch on the devices the reference's log-probabilities, and the key of the reference.

    Args:
      params: what is trained of the model; the reference itself at the stage's beginning.
    """
    params, key = kept_params(params, running)
    programs, log_probs = running.programs, running.programs.log_prob_step(running.stage)

    def add(batch: Batch) -> Batch:
        return batch | {REFERENCE: log_probs(programs.weights(params), batch)}

    return add, key


def kept_params(params: nnx.State, running: RunningStage) -> tuple[nnx.State, Key]:
    """What was trained of the model as the stage began, and its key; the same arguments as `live_reference`."""
    home, programs = running.folder / running.stage.name, running.programs
    if running.saved_key is None:
        params = jax.tree.map(jnp.copy, params)  # a step uses its own up
        save_params(home, params, {})
        running.say(f"stage {running.stage.name}: the reference is the model as it is now, kept in {home}")
    else:
        try:
            params, _ = restore_params(home, programs.abstract_state.params, say=running.say)
        except ModelFolderError:
            raise running.refusal(home, "is missing") from None
    key: Key = {"weights": fingerprint_of(params)}
    if running.saved_key not in (None, key):
        raise running.refusal(home, "is of other weights")
    return params, key
