"""Checkpoints that are whole and verified or not there: Orbax array files, a manifest written last, a run lock."""

from lightning_jax.checkpoints.checkpoints import Checkpoints
from lightning_jax.checkpoints.config import CheckpointConfig
from lightning_jax.checkpoints.manifest import CheckpointError, Manifest
from lightning_jax.checkpoints.restoring import Restored, newest_manifest, restore_newest
from lightning_jax.checkpoints.run_lock import RunLockError, run_lock

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Checkpoints",
    "Manifest",
    "Restored",
    "RunLockError",
    "newest_manifest",
    "restore_newest",
    "run_lock",
]
