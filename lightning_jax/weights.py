"""The weights in the folder of a run, laid out over a mesh; those of a run of adapters are merged.

A run that trains adapters saves the weights that they belong to once, as a run's folder of their own, `<run>/base`, and
in its checkpoints the adapters alone. So its folder is complete, and its checkpoints are small.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lightning_jax import parallel
from lightning_jax.checkpoints import CheckpointConfig, Checkpoints, restore_newest
from lightning_jax.model_folders import BASE, CHECKPOINTS, ModelFolderError, RunFolder
from lightning_jax.models import HybridLM, ModelConfig, lora
from lightning_jax.models.config import LoraConfig

Kind = type[HybridLM] | type[Any]
MATRICES = ("down", "up")


def abstract_model(
    config: ModelConfig, mesh: Mesh, *, kind: Kind = HybridLM, adapters: LoraConfig | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without weights: its graph, and the shapes, dtypes and shardings of its parameters."""
    operators = parallel.operators(mesh, config)

    def make() -> Any:
        model = kind(config, rngs=nnx.Rngs(0), operators=operators)
        if adapters:
            lora.adapt(model, adapters, rngs=nnx.Rngs(0))
        return model

    graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
    return graphdef, parallel.abstract(params, mesh)


def restore_weights(
    run: Path, config: ModelConfig, mesh: Mesh, *, kind: Kind = HybridLM, say: Callable[[str], None]
) -> tuple[nnx.State, int]:
    """The parameters of a run's newest checkpoint that verifies, and its step; of adapters none are left.

    Args:
        say: takes one line for each checkpoint that was rejected.

    Raises:
        UserError: there is no checkpoint in the folder, none verifies, or they are of another model.
    """
    _, plain = abstract_model(config, mesh, kind=kind)
    if not (adapters := RunFolder.open(run).adapters):
        return restore_params(run, plain, say=say)
    trained, frozen = lora.split(abstract_model(config, mesh, kind=kind, adapters=adapters)[1])
    base, _ = restore_params(run / BASE, lora.plain_of(frozen, adapters), say=say)
    trained, step = restore_params(run, trained, say=say)

    def merged(trained: nnx.State, base: nnx.State) -> nnx.State:
        return lora.merged(nnx.merge_state(trained, lora.frozen_of(base, adapters)), adapters)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, plain)
    return jax.jit(merged, out_shardings=shardings)(trained, base), step


def restore_params(run: Path, abstract: nnx.State, *, say: Callable[[str], None]) -> tuple[nnx.State, int]:
    """Parameters as they were saved, and the step. Raises UserError as `restore_weights` does."""
    restored = restore_newest(run / CHECKPOINTS, {"params": abstract}, say=say, partial=True)
    if restored is None:
        raise ModelFolderError(f"{run}: there is no whole checkpoint in it")
    return restored.state["params"], restored.step


def save_params(run: Path, params: nnx.State, metadata: dict[str, Any]) -> None:
    """Saves parameters as step 0 of a run's folder, in place of what is in it. Raises CheckpointError if it cannot."""
    if jax.process_index() == 0:
        shutil.rmtree(run, ignore_errors=True)
    once = CheckpointConfig(every_steps=0, every_minutes=0.0, keep_newest=1, keep_every_steps=0, max_failures=1)
    with Checkpoints(run / CHECKPOINTS, once) as checkpoints:
        checkpoints.save(0, {"params": params}, metadata, wait=True)


@dataclass(frozen=True)
class HostAdapters:
    """Adapters in the host's memory, for weights that never are in it whole.

    Attributes:
        matrices: (down, up) of each weight by its path in the model.
    """

    scale: float
    matrices: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def read(
        cls, run: Path, config: ModelConfig, adapters: LoraConfig, *, kind: Kind, say: Callable[[str], None]
    ) -> Self:
        """Those of a run's newest checkpoint that verifies. Raises UserError as `restore_weights` does."""
        mesh = parallel.make_mesh(parallel.MeshConfig.of(), jax.local_devices()[:1])
        trained, _ = lora.split(abstract_model(config, mesh, kind=kind, adapters=adapters)[1])
        arrays = dict(nnx.to_flat_state(restore_params(run, trained, say=say)[0]))
        return cls(
            adapters.scale,
            {
                "/".join(map(str, path[:-1])): tuple(np.asarray(arrays[(*path[:-1], name)][...]) for name in MATRICES)
                for path, leaf in arrays.items()
                if isinstance(leaf, lora.Adapter)
            },
        )

    def merge(self, path: str, start: tuple[int, ...], block: np.ndarray) -> np.ndarray:
        """A block of a weight, with all axes of it and beginning at index `start`, with what adapters add to it."""
        if path not in self.matrices:
            return block
        down, up = (matrix[start[:-2]] for matrix in self.matrices[path])
        change = down[start[-2] :][: block.shape[-2]] @ up[:, start[-1] :][:, : block.shape[-1]]
        return (block + self.scale * change).astype(block.dtype)
