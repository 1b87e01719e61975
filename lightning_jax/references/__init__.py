"""The reference of preference tuning: the model as the stage began, cached as log-probabilities or kept live."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from lightning_jax.input_pipeline import PreparedCorpus
from lightning_jax.references.cached import with_reference
from lightning_jax.references.live import live_reference
from lightning_jax.references.running_stage import Key, ReferenceError, RunningStage
from lightning_jax.train_step import Batch, TrainState

__all__ = ["Reference", "ReferenceError", "RunningStage", "reference_of"]


class Reference(NamedTuple):
    """What a stage takes of its reference.

    Attributes:
      corpora: of the stage, with what a cached reference says of them.
      add: gives a batch on the devices what a live reference says of it.
      key: to save with every checkpoint of the stage.
    """

    corpora: Mapping[str, PreparedCorpus]
    add: Callable[[Batch], Batch] = lambda batch: batch
    key: Key | None = None


def reference_of(state: TrainState, corpora: Mapping[str, PreparedCorpus], running: RunningStage) -> Reference:
    """The reference of a stage of preference tuning, as its config chooses it.

    Args:
      state: to go on from; at the stage's beginning its model is the reference.

    Raises:
      ReferenceError: the run goes on in the middle of the stage, and what it kept is missing or not its own.
    """
    if running.stage.config.preference.reference == "live":
        add, key = live_reference(state.params, running)
        return Reference(corpora, add, key)
    corpora, key = with_reference(corpora, running.programs.weights(state.params), running)
    return Reference(corpora, key=key)
