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
from lightning_jax.references.place import Key, Place, fingerprint_of
from lightning_jax.train_step import Batch
from lightning_jax.weights import restore_params, save_params


def live_reference(params: nnx.State, place: Place) -> tuple[Callable[[Batch], Batch], Key]:
    """What adds to a batch on the devices the reference's log-probabilities, and the key of the reference.

    Args:
      params: what is trained of the model; the reference itself at the stage's beginning.
    """
    params, key = kept_params(params, place)
    programs, log_probs = place.programs, place.programs.log_prob_step(place.stage)

    def add(batch: Batch) -> Batch:
        return batch | {REFERENCE: log_probs(programs.weights(params), batch)}

    return add, key


def kept_params(params: nnx.State, place: Place) -> tuple[nnx.State, Key]:
    """What was trained of the model as the stage began, and its key; the same arguments as `live_reference`."""
    home, programs = place.folder / place.stage.name, place.programs
    if place.saved_key is None:
        params = jax.tree.map(jnp.copy, params)  # a step uses its own up
        save_params(home, params, {})
        place.say(f"stage {place.stage.name}: the reference is the model as it is now, kept in {home}")
    else:
        try:
            params, _ = restore_params(home, programs.abstract_state.params, say=place.say)
        except ModelFolderError:
            raise place.refusal(home, "is missing") from None
    key: Key = {"weights": fingerprint_of(params)}
    if place.saved_key not in (None, key):
        raise place.refusal(home, "is of other weights")
    return params, key
