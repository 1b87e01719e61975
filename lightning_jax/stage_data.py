"""Where the batches of a stage come from: corpora, or rollouts of the policy that is trained.

Shapes: B rows of this host, T tokens of a row.
"""

from typing import Any, Protocol

from flax import nnx

from lightning_jax.input_pipeline import Batch as HostBatch
from lightning_jax.input_pipeline import GlobalBatches


class StageData(Protocol):
    """The batches of one stage, by its steps."""

    description: str  # for people
    position: dict[str, Any] | None  # what a checkpoint keeps of it, where the step does not say it all

    def needs_params(self, step: int) -> bool:
        """Whether the batch of a step is made with the parameters, which must be those of that step."""
        ...

    def batch(self, step: int, params: nnx.State) -> HostBatch:
        """This host's part of the batch of a step; steps are asked for in order."""
        ...

    def again(self, step: int) -> HostBatch:
        """The batch of a step asked for not long ago."""
        ...

    def close(self) -> None: ...


class CorpusData:
    """Batches of corpora, read ahead from `first_step` on."""

    position = None

    def __init__(self, batches: GlobalBatches, first_step: int):
        passes = ", ".join(f"{name} {passes:.2f}" for name, passes in batches.epochs(len(batches)).items())
        self.description = f"passes over the corpora: {passes}"
        self._batches, self._iterator = batches, batches.iterator(first_step)

    def needs_params(self, step: int) -> bool:
        return False

    def batch(self, step: int, params: nnx.State) -> HostBatch:
        return next(self._iterator)

    def again(self, step: int) -> HostBatch:
        return self._batches[step]

    def close(self) -> None:
        self._iterator.close()
