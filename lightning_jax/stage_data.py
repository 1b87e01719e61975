"""Where the batches of a stage come from: corpora, or rollouts of the policy that is trained."""

from typing import Any, Protocol

from lightning_jax.input_pipeline import Batch as HostBatch
from lightning_jax.input_pipeline import GlobalBatches
from lightning_jax.programs import Programs
from lightning_jax.references import Reference
from lightning_jax.train_step import Batch, TrainState


class StageData(Protocol):
    """The batches of one stage, by its steps.

    Attributes:
      description: for people.
      position: what a checkpoint keeps of it, where the step does not say it all.
    """

    description: str
    position: dict[str, Any] | None

    def needs_params(self, step: int) -> bool:
        """Whether the batch of a step is made with the parameters, which must be those of that step."""
        ...

    def batch(self, step: int, state: TrainState) -> Batch:
        """The batch of a step, on the devices; steps are asked for in order."""
        ...

    def again(self, step: int) -> HostBatch:
        """This host's part of the batch of a step asked for not long ago."""
        ...

    def close(self) -> None: ...


class CorpusData:
    """Batches of corpora, read ahead from `first_step` on, with what a live reference says of them."""

    position = None

    def __init__(self, batches: GlobalBatches, first_step: int, programs: Programs, reference: Reference):
        passes = ", ".join(f"{name} {passes:.2f}" for name, passes in batches.epochs(len(batches)).items())
        self.description = f"passes over the corpora: {passes}"
        self._batches, self._iterator = batches, batches.iterator(first_step)
        self._programs, self._reference = programs, reference

    def needs_params(self, step: int) -> bool:
        return False

    def batch(self, step: int, state: TrainState) -> Batch:
        return self._reference.add(self._programs.on_devices(next(self._iterator)))

    def again(self, step: int) -> HostBatch:
        return self._batches[step]

    def close(self) -> None:
        self._iterator.close()
