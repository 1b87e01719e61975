"""The files of a run that was killed and resumed equal those of a run that never was."""

import json
import logging
import math
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_jax.metrics.writer import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, MetricsWriter, read_metrics

STEPS = 9


def metrics_of(step):
    loss = np.float32(11.0 / (step + 3))
    return {
        "stage": "pretrain",
        "loss": loss,
        "expert_load": np.full((2, 3), loss),
        "validation_loss": {"text": loss / 3},
    }


def train(folder, first_step, last_step, resume_step, seconds=1.0):
    with MetricsWriter(folder, resume_step=resume_step, tensorboard=False) as writer:
        for step in range(first_step, last_step + 1):
            writer.write(step, metrics_of(step), {"seconds": seconds})
            if step % 3 == 0:
                writer.sample(step, stage="pretrain", prompt="Grüße\n", text=f"{step} NaN")


def without_timing(records):
    return [{name: value for name, value in record.items() if name != "timing"} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, 1, STEPS, None)
    return folder


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_resumed_files_equal_the_uninterrupted_ones_wherever_they_were_cut(data, uninterrupted, tmp_path_factory):
    """A kill leaves any prefix that holds the restored step's line: lines are written before checkpoints commit."""
    restored = data.draw(st.integers(0, STEPS - 1), label="restored step")
    folder = tmp_path_factory.mktemp("cut")
    for name in (METRICS_FILE, SAMPLES_FILE):
        content = (uninterrupted / name).read_bytes()
        lines = content.splitlines(keepends=True)
        least = sum(len(line) for line in lines if json.loads(line)["step"] <= restored)
        cut = data.draw(st.integers(least, len(content)), label=f"bytes of {name}")
        (folder / name).write_bytes(content[:cut])
    train(folder, restored + 1, STEPS, restored)
    for name in (METRICS_FILE, SAMPLES_FILE):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_only_timing_differs_between_machines(uninterrupted, tmp_path):
    train(tmp_path, 1, 5, None, seconds=2.0)
    train(tmp_path, 4, STEPS, 3, seconds=7.0)
    assert without_timing(read_metrics(tmp_path)) == without_timing(read_metrics(uninterrupted))
    assert [record["timing"]["seconds"] for record in read_metrics(tmp_path)] == [2.0] * 3 + [7.0] * (STEPS - 3)


def test_a_run_that_restored_nothing_starts_its_files_anew(tmp_path):
    train(tmp_path, 1, 4, None)
    train(tmp_path, 1, 2, None)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path / SAMPLES_FILE) == []


@settings(max_examples=200, deadline=None)
@given(value=st.floats(width=64))
def test_floats_read_back_to_the_same_bits(value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    with MetricsWriter(folder, resume_step=None, tensorboard=False) as writer:
        writer.write(1, {"loss": value})
    (record,) = read_metrics(folder)
    if math.isnan(value):
        assert math.isnan(record["loss"])
    else:
        assert struct.pack("<d", record["loss"]) == struct.pack("<d", value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_device_arrays_keep_their_value(dtype, tmp_path):
    value = jnp.asarray([1 / 3, 3e-5], dtype)
    with MetricsWriter(tmp_path, resume_step=None, tensorboard=False) as writer:
        returned = writer.write(
            jnp.int32(1), {"loss": value[0], "all": value, "count": jnp.int32(7), "ok": value[0] > 0}
        )
    (record,) = read_metrics(tmp_path)
    assert record == returned
    assert record["all"] == [float(value[0]), float(value[1])]
    assert np.array_equal(np.asarray(record["all"]).astype(dtype), np.asarray(value))
    assert record["count"] == 7
    assert record["ok"] is True


def test_keys_stand_in_one_order_whatever_the_order_they_came_in(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None, tensorboard=False) as writer:
        writer.write(1, {"b": 1, "a": {"z": 1, "y": 2}}, {"seconds": 1.0, "mfu": None})
        writer.write(1, {"a": {"y": 2, "z": 1}, "b": 1}, {"mfu": None, "seconds": 1.0})
    first, second = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert first == second
    assert first == '{"step": 1, "a": {"y": 2, "z": 1}, "b": 1, "timing": {"mfu": null, "seconds": 1.0}}'


def test_a_file_that_nobody_wrote_yet_has_no_records(tmp_path):
    assert read_metrics(tmp_path) == read_metrics(tmp_path / SAMPLES_FILE) == []


def test_half_written_and_unreadable_lines_are_left_out(tmp_path, caplog):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\x00\x00\x00\n[3]\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    with caplog.at_level(logging.WARNING):
        assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert f"{path}:2 is not a record of a step" in caplog.text
    assert f"{path}:3 is not a record of a step" in caplog.text
    MetricsWriter(tmp_path, resume_step=2, tensorboard=False).close()
    assert path.read_bytes() == b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'


def test_a_line_without_its_end_is_not_gone_on_with(tmp_path):
    """It could be complete but for the line break, and would swallow the next one."""
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}')
    assert [record["step"] for record in read_metrics(path)] == [1]
    with MetricsWriter(tmp_path, resume_step=2, tensorboard=False) as writer:
        writer.write(3, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=None, tensorboard=False)
    writer.write(1, {"loss": 2.0})
    assert [record["loss"] for record in read_metrics(tmp_path)] == [2.0]
    writer.close()


def test_events_are_never_cut(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None, tensorboard=False) as writer:
        writer.event("skipped_step", "gradient not finite", step=7)
    with open(tmp_path / EVENTS_FILE, "a") as file:
        file.write('{"step": 8, "time')
    with MetricsWriter(tmp_path, resume_step=3, tensorboard=False) as writer:
        writer.event("resume", "from step 3", step=3)
    events = read_metrics(tmp_path / EVENTS_FILE)
    assert [(event["kind"], event["step"]) for event in events] == [("skipped_step", 7), ("resume", 3)]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run", resume_step=None, tensorboard=True) as writer:
        assert writer.write(1, {"loss": np.float32(0.5)}) == {"step": 1, "loss": 0.5}
        writer.sample(1, stage="a", prompt="b", text="c")
        writer.event("resume", "from step 0", step=0)
    assert not (tmp_path / "run").exists()


def tensorboard_events(folder):
    """All events of a folder, file by file in the order of writing."""
    from tensorboardX.proto import event_pb2

    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: int(path.name.rsplit(".", 1)[1])):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard_has_every_number_and_forgets_the_same_steps_on_resume(tmp_path):
    for resume_step, steps in ((None, (1, 2, 3)), (1, (2,))):
        with MetricsWriter(tmp_path, resume_step=resume_step, tensorboard=True) as writer:
            for step in steps:
                writer.write(step, metrics_of(step), {"mfu": None, "seconds": 1.0})
    events = list(tensorboard_events(tmp_path))
    scalars = {(event.step, value.tag) for event in events for value in event.summary.value}
    assert scalars == {(step, tag) for step in (1, 2, 3) for tag in ("loss", "validation_loss/text", "timing/seconds")}
    assert [event.step for event in events if event.HasField("session_log")] == [0, 2]
    (loss,) = {v.simple_value for e in events for v in e.summary.value if (e.step, v.tag) == (2, "loss")}
    assert loss == metrics_of(2)["loss"]


def test_importing_the_package_loads_neither_tensorboard_nor_matplotlib():
    import subprocess

    code = "import lightning_jax.metrics, sys; print(sorted({'tensorboardX', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
