import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import KEEP_ALL, abstract, arrays, assert_same_bits, data_file, save_steps

from lightning_jax.checkpoints import CheckpointError, Checkpoints, newest_manifest, restore_newest
from lightning_jax.checkpoints.manifest import MANIFEST


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    save_steps(folder, [1, 2], size=4096)
    return folder


@pytest.fixture
def folder(two_steps, tmp_path) -> Path:
    """Checkpoints 1 and 2, to be damaged."""
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def expected(step: int) -> dict:
    return arrays(step, size=4096)


def flip_bit(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def overwrite(file: Path, offset: int, content: bytes) -> None:
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def truncate(file: Path) -> None:
    overwrite(file, 0, b"")
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def copy_arrays_of_step_1(step: Path) -> None:
    shutil.rmtree(step / "arrays")
    shutil.copytree(step.parent / "1" / "arrays", step / "arrays")


def exchange_data_for_that_of_step_1(step: Path) -> None:
    data_file(step).write_bytes(data_file(step.parent / "1").read_bytes())


def copy_whole_step_1(step: Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.parent / "1", step)


def empty_folder(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def a_file_in_its_place(step: Path) -> None:
    shutil.rmtree(step)
    step.touch()


def change_position_in_manifest(step: Path) -> None:
    manifest = step / MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flipped in data": (lambda step: flip_bit(data_file(step), 80_001), "leaf w. has fingerprint"),
    "4 KB of data zeroed": (lambda step: overwrite(data_file(step), 8192, bytes(4096)), "leaf w. has fingerprint"),
    "data truncated": (lambda step: truncate(data_file(step)), r"file arrays/.* has \d+ bytes, not \d+"),
    "data deleted": (lambda step: data_file(step).unlink(), r"file arrays/.* is missing"),
    "data emptied": (lambda step: data_file(step).write_bytes(b""), r"has 0 bytes, not \d+"),
    "data renamed": (lambda step: data_file(step).rename(step / "arrays" / "other"), r"file arrays/.* is missing"),
    "Orbax's metadata deleted": (lambda step: (step / "arrays" / "_METADATA").unlink(), "arrays/_METADATA is missing"),
    "Orbax's metadata garbled": (
        lambda step: overwrite(step / "arrays" / "_METADATA", 0, b"xx"),
        "file arrays/_METADATA was altered",
    ),
    "index garbled": (
        lambda step: overwrite(step / "arrays" / "manifest.ocdbt", 8, b"xxxx"),
        "file arrays/manifest.ocdbt was altered",
    ),
    "arrays folder deleted": (lambda step: shutil.rmtree(step / "arrays"), r"file arrays/.* is missing"),
    "manifest deleted": (lambda step: (step / MANIFEST).unlink(), r"it has no MANIFEST\.json"),
    "manifest truncated": (lambda step: truncate(step / MANIFEST), r"MANIFEST\.json is not readable"),
    "manifest emptied": (lambda step: (step / MANIFEST).write_bytes(b""), r"MANIFEST\.json is not readable"),
    "manifest not text": (lambda step: overwrite(step / MANIFEST, 9, b"\xff"), r"MANIFEST\.json is not readable"),
    "manifest altered": (change_position_in_manifest, r"MANIFEST\.json does not match its own checksum"),
    "empty folder": (empty_folder, r"it has no MANIFEST\.json"),
    "a file in its place": (a_file_in_its_place, r"it has no MANIFEST\.json"),
    "arrays of another step": (copy_arrays_of_step_1, r"file arrays/.* is missing"),
    "data of another step": (
        exchange_data_for_that_of_step_1,
        r"(leaf w. has fingerprint|file .* has \d+ bytes)",  # Orbax divides the arrays among files as it likes
    ),
    "another step under this name": (copy_whole_step_1, "its manifest is that of step 1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_costs_one_line_and_the_one_before_is_used(folder, damage):
    act, reason = DAMAGES[damage]
    act(folder / "2")
    lines = []
    with Checkpoints(folder, KEEP_ALL) as checkpoints:
        restored = checkpoints.restore(abstract(expected(1)), say=lines.append)
        assert restored.step == 1
        assert_same_bits(restored.state, expected(1))
        assert len(lines) == 1
        assert re.fullmatch(f"checkpoint 2 rejected: .*{reason}.*", lines[0]), lines[0]
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2.rejected"]
        # The run goes on over the same step.
        assert checkpoints.save(2, expected(2), {}, wait=True)
        assert checkpoints.restore(abstract(expected(1))).step == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_no_checkpoint_verifies_the_run_stops_and_nothing_is_touched(folder, damage):
    DAMAGES[damage][0](folder / "2")
    shutil.rmtree(folder / "1")
    with Checkpoints(folder, KEEP_ALL) as checkpoints:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used \(1 rejected\)"):
                checkpoints.restore(abstract(expected(1)), say=lambda line: None)
    assert [path.name for path in folder.iterdir()] == ["2"]


def test_restoring_walks_past_several_damaged_steps(tmp_path):
    save_steps(tmp_path, [1, 2, 30, 4])
    (tmp_path / "30" / MANIFEST).unlink()
    flip_bit(data_file(tmp_path / "4"), 9_999)
    lines = []
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.restore(abstract(arrays(1)), say=lines.append).step == 2
    assert [line.split(":")[0] for line in lines] == ["checkpoint 30 rejected", "checkpoint 4 rejected"]


def test_reading_only_leaves_a_damaged_checkpoint_where_it_is(folder):
    (folder / "2" / MANIFEST).unlink()
    assert restore_newest(folder, abstract(expected(1)), say=lambda line: None).step == 1
    assert newest_manifest(folder).metadata == {"step": 1}
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_step_rejected_twice_is_kept_twice(folder):
    for _ in range(2):
        (folder / "2" / MANIFEST).unlink()
        with Checkpoints(folder, KEEP_ALL) as checkpoints:
            assert checkpoints.restore(abstract(expected(1)), say=lambda line: None).step == 1
            checkpoints.save(2, expected(2), {})
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "2.rejected", "2.rejected-2"]


def test_a_folder_with_rejected_checkpoints_only_is_not_a_fresh_start(folder):
    shutil.rmtree(folder / "1")
    (folder / "2").rename(folder / "2.rejected")
    with Checkpoints(folder, KEEP_ALL) as checkpoints, pytest.raises(CheckpointError, match=r"\(1 rejected\).*step 0"):
        checkpoints.restore(abstract(expected(1)))


def test_a_folder_without_checkpoints_restores_nothing(tmp_path):
    assert newest_manifest(tmp_path / "none") is None
    with Checkpoints(tmp_path / "none", KEEP_ALL) as checkpoints:
        assert checkpoints.restore(abstract(expected(1))) is None


def test_every_flipped_bit_of_every_file_is_detected_or_harmless(folder):
    """Orbax alone loads a flipped bit of the data as another weight; no flip may end in other weights here."""
    shutil.rmtree(folder / "1")
    generator = np.random.default_rng(0)
    files = [path for path in (folder / "2").rglob("*") if path.is_file()]
    large = data_file(folder / "2")
    detected_in_data = 0
    for trial in range(90):
        file = large if trial < 60 else files[trial % len(files)]
        intact = file.read_bytes()
        flip_bit(file, int(generator.integers(8 * len(intact))))
        try:
            restored = restore_newest(folder, abstract(expected(2)), say=lambda line: None)
        except CheckpointError:
            detected_in_data += file == large
        else:
            assert restored.metadata == {"step": 2}
            assert_same_bits(restored.state, expected(2))
        file.write_bytes(intact)
    assert detected_in_data >= 60


WRONG = {
    "shape": ({"w2": jnp.zeros((8, 640))}, r"w2 is float32\[8, 4096\] there and float32\[8, 640\] here"),
    "dtype": (
        {"w2": jnp.zeros((8, 4096), jnp.bfloat16)},
        r"w2 is float32\[8, 4096\] there and bfloat16\[8, 4096\] here",
    ),
    "more layers": ({"w4": jnp.zeros((2, 3))}, r"it has no w4, which is float32\[2, 3\] here"),
    "fewer layers": ({"w3": None}, r"it has w3, float32\[8, 4096\], which is not here"),
    "several": ({"w1": jnp.int32(0), "w2": jnp.int32(0)}, r"w1 is float32\[8, 4096\] there and int32\[\] here"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_of_another_model_is_refused_by_its_first_difference(folder, wrong):
    changes, difference = WRONG[wrong]
    lines = []
    with Checkpoints(folder, KEEP_ALL) as checkpoints, pytest.raises(CheckpointError) as refused:
        checkpoints.restore(abstract({**expected(2), **changes}), say=lines.append)
    line = f"checkpoint 2 in {folder} is of another model: {difference}; use the configuration .* or another folder"
    assert re.fullmatch(line, str(refused.value))
    assert not lines
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_arrays_that_orbax_cannot_read_are_damage(folder, monkeypatch):
    """A fault of its files that no size or checksum shows; Orbax and TensorStore raise what they like."""
    lines = []
    for error in (ValueError("DATA_LOSS: bad\n  node"), KeyError("w1"), OSError(5, "Input/output error"), Exception()):
        monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", Mock(side_effect=error))
        with pytest.raises(CheckpointError):
            restore_newest(folder, abstract(expected(1)), say=lines.append)
    assert lines[0] == "checkpoint 2 rejected: its arrays cannot be read: ValueError: DATA_LOSS: bad node"
    assert len(lines) == 8
    assert not any("\n" in line for line in lines)


def test_a_part_of_the_state_may_be_read_alone(folder):
    part = {"w2": expected(2)["w2"]}
    restored = restore_newest(folder, abstract(part), say=print, partial=True)
    assert_same_bits(restored.state, part)
    with pytest.raises(CheckpointError, match="it has no w4"):
        restore_newest(folder, abstract({**part, "w4": part["w2"]}), say=print, partial=True)


def test_a_checkpoint_of_another_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr("lightning_jax.checkpoints.manifest.FORMAT", 2)
    with pytest.raises(CheckpointError, match="has checkpoint format 1; this version reads format 2"):
        restore_newest(folder, abstract(expected(1)), say=print)


@pytest.mark.parametrize(
    "error", [MemoryError(), PermissionError(13, "Permission denied"), ValueError("RESOURCE_EXHAUSTED: out of memory")]
)
def test_a_fault_of_the_machine_is_no_damage(folder, monkeypatch, error):
    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", Mock(side_effect=error))
    with Checkpoints(folder, KEEP_ALL) as checkpoints, pytest.raises(type(error)):
        checkpoints.restore(abstract(expected(1)))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
