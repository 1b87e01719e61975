"""The policy as its stage began, from which the objective measures a divergence: kept in the run's folder."""

import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lightning_jax.checkpoints import CheckpointConfig, Checkpoints, restore_newest
from lightning_jax.errors import UserError

FOLDER = "reference"  # in that of the run


class ReferencePolicyError(UserError):
    """The policy as the stage began is gone; one line."""


def reference_policy(
    folder: pathlib.Path, stage: str, params: nnx.State, *, begins: bool, say: Callable[[str], None]
) -> nnx.State:
    """A copy of the parameters that the stage began with, laid out as `params` are.

    Args:
        folder: of the run.
        params: as the run goes on.
        begins: whether these are they; then they are saved.

    Raises:
        ReferencePolicyError: the run goes on in the middle of the stage, and they are missing or damaged.
    """
    path = folder / FOLDER / f"{stage}_policy"
    if begins:
        copy = jax.tree.map(jnp.copy, params)
        keep_one = CheckpointConfig(every_steps=0, every_minutes=0.0, keep_newest=1, keep_every_steps=0, max_failures=1)
        if jax.process_index() == 0:
            shutil.rmtree(path, ignore_errors=True)  # of an attempt at the stage that came to no checkpoint
        with Checkpoints(path, keep_one, say=say) as checkpoints:
            checkpoints.save(0, {"params": copy}, {}, wait=True)
        return copy
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    restored = restore_newest(path, {"params": abstract}, say=say)
    if restored is None:
        raise ReferencePolicyError(
            f"{path}: the policy that stage {stage} began with is missing; bring the folder back, or begin the stage "
            "again in another --workdir with --init_from"
        )
    return restored.state["params"]
