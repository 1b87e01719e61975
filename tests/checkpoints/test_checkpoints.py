import dataclasses
import json
import os
import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import KEEP_ALL, abstract, arrays, assert_same_bits, save_steps, training_state

from lightning_jax.checkpoints import CheckpointConfig, CheckpointError, Checkpoints, restore_newest
from lightning_jax.checkpoints.array_files import ArrayFiles
from lightning_jax.checkpoints.restoring import committed_steps

MB = 1_000_000


def shardings() -> dict[str, jax.sharding.Sharding]:
    devices = jax.devices()

    def named(shape: tuple[int, ...], axes: tuple[str, ...], *spec: str | None) -> jax.sharding.Sharding:
        mesh = jax.make_mesh(shape, axes, devices=devices[: np.prod(shape)])
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return {
        "1 device": jax.sharding.SingleDeviceSharding(devices[0]),
        "8 by rows": named((8,), ("data",), "data"),
        "2 replicas": named((2,), ("data",)),
        "2 x 4": named((2, 4), ("data", "tensor"), "data", "tensor"),
        "4 x 2 the other way": named((4, 2), ("data", "tensor"), "tensor", "data"),
    }


def test_a_training_state_comes_back_to_the_bit_with_its_metadata(tmp_path):
    state = training_state(3)
    metadata = {"config": {"lr": 0.1, "layers": [1, 2]}, "position": 12345678901234567, "stage": None}
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.save(3, state, metadata)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        restored = checkpoints.restore(abstract(state))
    assert restored.step == 3
    assert restored.metadata == metadata
    assert_same_bits(restored.state, state)


def test_every_dtype_and_every_bit_pattern_comes_back(tmp_path):
    # NaNs with payloads, subnormals and -0 among them.
    every_16_bits = np.arange(1 << 16, dtype=np.uint16)
    every_byte = np.arange(256, dtype=np.uint8)
    state = {
        "float32": jnp.asarray(np.frombuffer(np.random.default_rng(0).bytes(1 << 16), np.float32)),
        "bfloat16": jnp.asarray(every_16_bits.view(jnp.bfloat16)),
        "float16": jnp.asarray(every_16_bits.view(np.float16)),
        "float8": jnp.asarray(every_byte.view(jnp.float8_e4m3fn)),
        "int32": jnp.asarray([-(2**31), -1, 2**31 - 1], jnp.int32),
        "uint8": jnp.asarray(every_byte),
        "complex64": jnp.asarray([1 + 2j, complex(np.nan, -0.0)], jnp.complex64),
        "bool": jnp.asarray([True, False]),
        "int4": jnp.asarray([-8, 7], jnp.int4),
        "keys": jax.random.split(jax.random.key(5, impl="rbg"), 3),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "scalar": jnp.float32(-0.0),
    }
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        checkpoints.save(0, state, {})
        assert_same_bits(checkpoints.restore(abstract(state)).state, state)


@pytest.mark.parametrize("saved", ["1 device", "8 by rows", "2 x 4"])
def test_a_checkpoint_restores_onto_any_mesh_and_number_of_devices(tmp_path, saved):
    state = {**arrays(0), "keys": jax.random.split(jax.random.key(1), 8)}
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        by_rows = {"w1": shardings()[saved], "w2": shardings()[saved], "w3": shardings()["1 device"]}
        checkpoints.save(1, {**state, **{name: jax.device_put(state[name], to) for name, to in by_rows.items()}}, {})
        for sharding in shardings().values():
            keys = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data"))
            target = {**abstract(arrays(0), sharding), "keys": abstract(state, keys)["keys"]}
            restored = checkpoints.restore(target).state
            assert_same_bits(restored, state)
            assert restored["w1"].sharding == sharding
            assert restored["keys"].sharding.is_equivalent_to(keys, 1)


@pytest.mark.parametrize(("saved", "restored"), [("device", "pinned_host"), ("pinned_host", "device")])
def test_arrays_in_the_hosts_memory_are_saved_and_restored_as_others(tmp_path, saved, restored):
    mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4])
    places = {kind: jax.NamedSharding(mesh, jax.P("a"), memory_kind=kind) for kind in ("device", "pinned_host")}
    state = jax.device_put(arrays(1), places[saved])
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.save(1, state, {}, wait=True)
        found = checkpoints.restore(abstract(state, places[restored])).state
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(found)} == {restored}
    assert_same_bits(found, state)


def test_moving_from_one_device_to_eight_and_to_two_keeps_every_bit(tmp_path):
    state = arrays(7)
    for step, name in enumerate(["1 device", "8 by rows", "2 x 4", "2 replicas"]):
        with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
            here = jax.device_put(state, shardings()[name])
            if step:
                here = checkpoints.restore(abstract(state, shardings()[name])).state
            checkpoints.save(step, here, {})
    assert_same_bits(here, state)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.01 + 1, state), donate_argnums=0)
    for name in ("1 device", "8 by rows"):
        state = jax.device_put(arrays(1, size=40_000), shardings()[name])
        expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
        with Checkpoints(tmp_path / name, KEEP_ALL) as checkpoints:
            checkpoints.save(1, state, {})
            for _ in range(5):
                state = update(state)
            restored = checkpoints.restore(abstract(expected)).state
        assert_same_bits(restored, jax.tree.map(jnp.asarray, expected))


def test_saving_does_not_wait_for_the_files(tmp_path, monkeypatch):
    release = hold_writing(monkeypatch)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.save(1, arrays(1), {})
        assert committed_steps(tmp_path) == []
        release.set()
        checkpoints.wait()
        assert committed_steps(tmp_path) == [1]


def hold_writing(monkeypatch) -> threading.Event:
    """Files are written only after the event is set."""
    event, start_writing = threading.Event(), ArrayFiles.start_writing

    def start_held(self, folder, stored):
        finish = start_writing(self, folder, stored)
        return lambda: (event.wait(60), finish())

    monkeypatch.setattr(ArrayFiles, "start_writing", start_held)
    return event


def test_a_save_slower_than_the_interval_is_said(tmp_path, monkeypatch):
    lines, release = [], hold_writing(monkeypatch)
    with Checkpoints(tmp_path, KEEP_ALL, say=lines.append) as checkpoints:
        checkpoints.save(1, arrays(1), {})
        threading.Timer(0.2, release.set).start()
        checkpoints.save(2, arrays(2), {})
        assert lines == ["checkpoint 1 takes longer to save than the interval; step 2 waits for it"]
    assert sorted(committed_steps(tmp_path)) == [1, 2]


def test_the_newest_and_the_multiples_are_kept(tmp_path):
    config = CheckpointConfig(every_steps=1, every_minutes=0.0, keep_newest=2, keep_every_steps=4, max_failures=3)
    with Checkpoints(tmp_path, config) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, arrays(step), {})
    assert sorted(os.listdir(tmp_path), key=int) == ["4", "8", "9", "10"]


def test_keeping_rules_that_are_off_keep_the_newest():
    config = CheckpointConfig(every_steps=0, every_minutes=0.0, keep_newest=0, keep_every_steps=0, max_failures=0)
    assert config.keeps([3, 1, 2]) == {3}
    assert config.problems() == []
    problems = dataclasses.replace(config, keep_newest=-1).problems()
    assert problems == ["keep_newest: -1 is negative; 0 turns the rule off"]


def test_due_by_steps_and_by_minutes(tmp_path):
    config = dataclasses.replace(KEEP_ALL, every_steps=10, every_minutes=1.0)
    with Checkpoints(tmp_path, config) as checkpoints:
        seconds = {1: 1000.0, 9: 1050.0, 10: 1055.0, 11: 1065.0, 12: 1115.0, 13: 1116.0, 20: 1120.0}
        assert [step for step, now in seconds.items() if checkpoints.due(step, now)] == [10, 12, 20]
    with Checkpoints(tmp_path, dataclasses.replace(KEEP_ALL, every_steps=0)) as checkpoints:
        assert not any(checkpoints.due(step, 1e6 * step) for step in range(5))


def test_a_step_already_saved_is_not_saved_again(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.save(1, arrays(1), {"first": True}, wait=True)
        assert checkpoints.save(1, arrays(2), {"first": False}, wait=True)
        assert checkpoints.restore(abstract(arrays(1))).metadata == {"first": True}


def test_metadata_that_json_cannot_hold_is_refused(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints, pytest.raises(CheckpointError, match="what JSON holds"):
        checkpoints.save(1, arrays(1), {"array": np.zeros(2)})


def test_leftovers_of_a_killed_run_are_removed_at_the_next_start(tmp_path):
    save_steps(tmp_path, [1, 2])
    shutil.copytree(tmp_path / "2", tmp_path / "3.saving")
    shutil.copytree(tmp_path / "2", tmp_path / "0.deleting")
    (tmp_path / "0.deleting" / "MANIFEST.json").unlink()
    with Checkpoints(tmp_path, KEEP_ALL):
        assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_kill_in_the_first_save_starts_from_scratch(tmp_path):
    (tmp_path / "5.saving" / "arrays").mkdir(parents=True)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.restore(abstract(arrays(0))) is None


# Disks that fail.


@pytest.mark.parametrize("where", ["mkdir", "write", "merge", "sync", "manifest", "rename"])
def test_a_full_disk_costs_one_save_wherever_it_strikes(tmp_path, monkeypatch, where):
    lines = []
    with Checkpoints(tmp_path, KEEP_ALL, say=lines.append) as checkpoints:
        assert checkpoints.save(1, arrays(1), {}, wait=True)
        with monkeypatch.context() as patch:
            break_disk(patch, where)
            assert not checkpoints.save(2, arrays(2), {}, wait=True)
        assert os.listdir(tmp_path) == ["1"]
        assert checkpoints.save(3, arrays(3), {}, wait=True)
        assert checkpoints.restore(abstract(arrays(1))).step == 3
    assert lines == [f"checkpoint 2 could not be saved in {tmp_path}: no space left on device; the run goes on"]


def break_disk(patch: pytest.MonkeyPatch, where: str) -> None:
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    module = "lightning_jax.checkpoints"
    target = {
        "mkdir": "pathlib.Path.mkdir",
        "write": f"{module}.array_files.ArrayFiles.start_writing",
        "merge": f"{module}.array_files.ArrayFiles.merge",
        "sync": f"{module}.checkpoints.sync_tree",
        "manifest": f"{module}.manifest.json.dump",
        "rename": "pathlib.Path.rename",
    }[where]
    patch.setattr(target, full if where != "write" else lambda *arguments: full)


def test_failures_in_a_row_stop_the_run_and_a_success_resets_the_count(tmp_path, monkeypatch):
    lines = []
    with Checkpoints(tmp_path, KEEP_ALL, say=lines.append) as checkpoints:
        for step in range(1, 8):
            with monkeypatch.context() as patch:
                if step != 3:
                    break_disk(patch, "merge")
                if step == 6:
                    with pytest.raises(CheckpointError, match=r"checkpoint 6 .* 3 in a row, so the run stops"):
                        checkpoints.save(step, arrays(step), {}, wait=True)
                    break
                assert checkpoints.save(step, arrays(step), {}, wait=True) == (step == 3)
    assert len(lines) == 4
    assert os.listdir(tmp_path) == ["3"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_cost_the_new_one(tmp_path, monkeypatch, caplog):
    lines = []
    with Checkpoints(tmp_path, dataclasses.replace(KEEP_ALL, keep_newest=1), say=lines.append) as checkpoints:
        assert checkpoints.save(1, arrays(1), {}, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr("lightning_jax.checkpoints.checkpoints.shutil.rmtree", deny)
            assert checkpoints.save(2, arrays(2), {}, wait=True)
        assert checkpoints.restore(abstract(arrays(2))).step == 2
    assert not lines
    assert "checkpoint 1, no longer needed, could not be deleted" in caplog.text


def deny(*arguments, **options) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_failure_in_the_background_is_said_at_the_next_step(tmp_path, monkeypatch):
    lines = []
    with Checkpoints(tmp_path, KEEP_ALL, say=lines.append) as checkpoints, monkeypatch.context() as patch:
        break_disk(patch, "merge")
        assert checkpoints.save(1, arrays(1), {})
        while not lines:
            checkpoints.due(2, 0.0)
    assert "checkpoint 1 could not be saved" in lines[0]


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    lines = []
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("lightning_jax.checkpoints.checkpoints.shutil.disk_usage", lambda path: usage)
    with Checkpoints(tmp_path, KEEP_ALL, say=lines.append) as checkpoints:
        assert not checkpoints.save(1, arrays(1), {})
    assert lines == [
        f"checkpoint 1 could not be saved in {tmp_path}: 6.14e-06 GB needed, 1e-06 GB free on the disk; the run goes on"
    ]


@pytest.fixture
def disk_of_10_mb(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's late answers
def test_a_disk_that_fills_up_loses_no_checkpoint_and_saving_goes_on_when_there_is_room(disk_of_10_mb, monkeypatch):
    folder, lines = disk_of_10_mb / "checkpoints", []
    with Checkpoints(folder, dataclasses.replace(KEEP_ALL, max_failures=0), say=lines.append) as checkpoints:
        states = {step: arrays(step, size=45_000) for step in range(1, 5)}  # 4.3 MB each
        assert [checkpoints.save(step, states[step], {}, wait=True) for step in (1, 2, 3)] == [True, True, False]
        with monkeypatch.context() as patch:  # room when the save began, taken by others since
            plenty = shutil.disk_usage("/")._replace(free=100 * MB)
            patch.setattr("lightning_jax.checkpoints.checkpoints.shutil.disk_usage", lambda path: plenty)
            assert not checkpoints.save(3, states[3], {}, wait=True)
        assert sorted(os.listdir(folder)) == ["1", "2"]
        assert "no space left on device" in lines[-1]
        shutil.rmtree(folder / "1")
        assert checkpoints.save(4, states[4], {}, wait=True)
        restored = checkpoints.restore(abstract(states[4]))
        assert restored.step == 4
        assert_same_bits(restored.state, states[4])


def test_the_manifest_says_what_wrote_the_checkpoint(tmp_path):
    save_steps(tmp_path, [4])
    manifest = json.loads((tmp_path / "4" / "MANIFEST.json").read_text())
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["leaves"]["w1"]["shape"] == [8, 64]
    assert restore_newest(tmp_path, abstract(arrays(4)), say=print).metadata == {"step": 4}
