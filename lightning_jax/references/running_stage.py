"""What both kinds of reference need to know of the run."""

import hashlib
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from lightning_jax.checkpoints.fingerprint import fingerprints
from lightning_jax.checkpoints.state_tree import named_leaves
from lightning_jax.errors import UserError
from lightning_jax.programs import Programs
from lightning_jax.stages import Stage

Key = dict[str, Any]


class ReferenceError(UserError):
    """A reference that cannot be trusted, or no longer be made; one line."""


@dataclass(frozen=True)
class RunningStage:
    """A stage as a run goes through it.

    Attributes:
      saved_key: of the checkpoint from which the run goes on in the middle of the stage; None at the stage's beginning.
      run: its folder.
      say: takes a line for the user.
      progress: takes what is being done, again whenever it gets on: it may take longer than a step may.
    """

    stage: Stage
    programs: Programs
    saved_key: Key | None
    run: pathlib.Path
    say: Callable[[str], None]
    progress: Callable[[str], None]

    @property
    def folder(self) -> pathlib.Path:
        """Of the references of the run."""
        return self.run / "reference"

    def refusal(self, path: pathlib.Path, why: str) -> ReferenceError:
        return ReferenceError(
            f"{path}: {why}, and the weights that stage {self.stage.name} began with are gone; "
            "bring it back, or begin the stage again in another --workdir with --init_from"
        )


def fingerprint_of(weights: nnx.State) -> str:
    """Equal for equal weights, however they are laid out; every process calls it."""
    arrays = named_leaves(weights)
    return hashlib.sha256(json.dumps(fingerprints(arrays)(), sort_keys=True).encode()).hexdigest()
