"""A Hugging Face folder loaded by two processes: each reads what its devices hold, and together they have it all."""

import pathlib

import jax
import numpy as np
import pytest
import released_models
from two_processes import in_two_processes

from lightning_jax.checkpoints.safetensors_folder import Tensor
from lightning_jax.parallel import MeshConfig
from lightning_jax.trained_model import load_model

pytestmark = pytest.mark.slow


def load(folder: pathlib.Path) -> None:
    read, elements = Tensor.read, 0

    def counted(tensor: Tensor, *arguments) -> np.ndarray:
        nonlocal elements
        block = read(tensor, *arguments)
        elements += block.size
        return block

    Tensor.read = counted
    params = load_model(folder, mesh=MeshConfig.of(fsdp=8), say=print).params
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 0.5 * total <= elements < 0.55 * total  # norms are whole on every device
    whole = load_model(folder, say=print).params
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
        for shard in found.addressable_shards:
            assert np.array_equal(shard.data, np.asarray(expected)[shard.index])


def test_each_process_reads_what_its_devices_hold(tmp_path):
    fields = released_models.RELEASED | {"hidden_size": 64}
    in_two_processes(
        load, released_models.write(tmp_path / "theirs", fields, released_models.weights(fields), shards=3)
    )
