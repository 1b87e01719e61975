"""Two real processes, four devices each, that save and restore one state together."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_states import KEEP_ALL, abstract, arrays, assert_same_bits, data_file, save_steps
from two_processes import in_two_processes

from lightning_jax.checkpoints import Checkpoints, newest_manifest
from lightning_jax.checkpoints.array_files import ArrayFiles

pytestmark = pytest.mark.slow

SIZE = 4096  # files too large for a checksum: only the fingerprints protect them


def shardings() -> dict[str, jax.sharding.Sharding]:
    """By rows over all devices, replicated on every device, and sharded within each process but replicated across."""
    mesh = jax.make_mesh((2, 4), ("process", "device"))
    spec = jax.sharding.PartitionSpec
    specs = {"w1": spec(("process", "device")), "w2": spec(), "w3": spec(None, "device")}
    return {name: jax.sharding.NamedSharding(mesh, one) for name, one in specs.items()}


def global_arrays(seed: int) -> dict[str, jax.Array]:
    local = {name: np.asarray(array) for name, array in arrays(seed, SIZE).items()}
    return {
        name: jax.make_array_from_callback(local[name].shape, sharding, lambda index, x=local[name]: x[index])
        for name, sharding in shardings().items()
    }


def target() -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        for name, array in global_arrays(0).items()
    }


def assert_same_shards(found: dict[str, jax.Array], expected: dict[str, jax.Array]) -> None:
    for name, array in expected.items():
        for one, other in zip(found[name].addressable_shards, array.addressable_shards, strict=True):
            assert np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes()


def save_and_restore(checkpoints: Checkpoints, lines: list[str]) -> None:
    for step in (11, 12):
        assert checkpoints.save(step, global_arrays(step), {"step": step})
    restored = checkpoints.restore(target())
    assert (restored.step, restored.metadata) == (12, {"step": 12})
    assert_same_shards(restored.state, global_arrays(12))
    assert not any("could not be saved" in line for line in lines)


def one_process_fails(checkpoints: Checkpoints, lines: list[str]) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    start_writing = ArrayFiles.start_writing
    if jax.process_index() == 1:
        ArrayFiles.start_writing = lambda *arguments: fail
    checkpoints.save(21, global_arrays(21), {}, wait=True)
    ArrayFiles.start_writing = start_writing
    assert len(lines) == 1
    assert ("process 1 did not write its part", "no space left on device")[jax.process_index()] in lines[0]
    assert checkpoints.save(22, global_arrays(22), {"step": 22}, wait=True)
    assert checkpoints.restore(target()).step == 22


def restore_past_damage(checkpoints: Checkpoints, lines: list[str]) -> None:
    restored = checkpoints.restore(target())
    assert restored.step == 1
    assert_same_shards(restored.state, global_arrays(1))
    assert [line[:21] for line in lines] == (
        [] if jax.process_index() else ["checkpoint 3 rejected", "checkpoint 2 rejected"]
    )


def with_checkpoints(task, folder: Path) -> None:
    lines: list[str] = []
    with Checkpoints(folder, KEEP_ALL, say=lines.append) as checkpoints:
        task(checkpoints, lines)


def test_a_state_saved_by_two_processes_restores_in_two_and_in_one(tmp_path):
    in_two_processes(with_checkpoints, save_and_restore, tmp_path)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(arrays(0, SIZE))).state, arrays(12, SIZE))
        checkpoints.save(13, arrays(12, SIZE), {}, wait=True)
    together = newest_manifest(tmp_path).leaves
    shutil.rmtree(tmp_path / "13")
    assert together == newest_manifest(tmp_path).leaves


def test_a_save_that_fails_on_one_process_is_lost_on_both_and_the_next_is_whole(tmp_path):
    in_two_processes(with_checkpoints, one_process_fails, tmp_path)
    assert os.listdir(tmp_path) == ["22"]


def test_two_processes_walk_down_together_past_a_damaged_checkpoint(tmp_path):
    save_steps(tmp_path, [1, 2, 3], size=SIZE)
    (tmp_path / "3" / "MANIFEST.json").unlink()
    data = data_file(tmp_path / "2")
    data.write_bytes(bytes(data.stat().st_size))
    in_two_processes(with_checkpoints, restore_past_damage, tmp_path)
