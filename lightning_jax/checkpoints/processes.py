"""What the processes of one run tell each other about a checkpoint. With one process every function is immediate."""

import itertools

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_BARRIER_TIMEOUT_S = 1200

_barriers = itertools.count()  # every process passes the same barriers in the same order


def is_primary() -> bool:
    """Whether this process writes the manifest, renames and deletes."""
    return jax.process_index() == 0


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds on every process. Waits for all; runs on the devices, so only the main thread may call it."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def primary_says(value: bool) -> bool:
    """The `value` of process 0, on every process. Main thread only, as `all_agree`."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def reserve_barrier() -> str:
    """Names a barrier for `wait_at`. Every process must reserve in the same order, from the main thread."""
    return f"lightning_jax_checkpoint_{next(_barriers)}"


def wait_at(barrier: str) -> None:
    """Waits for the other processes without the devices, so a background thread may call it."""
    ocp.multihost.get_barrier_sync_fn()(key=barrier, timeout_ms=_BARRIER_TIMEOUT_S * 1000)
