"""Real processes that are the hosts of one run: trained, killed, stopped, and resumed in other numbers."""

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_run

from lightning_jax.hosts import RESTART
from lightning_jax.launch import host_environment, reserved_port

pytestmark = pytest.mark.slow

STEPS = 12
ROWS = 8
SETTINGS = {
    "run_stages": "pretraining",
    "stages__pretraining__tokens": STEPS * ROWS * 64,
    "stages__pretraining__schedule__warmup_steps": 2,
    "stages__pretraining__schedule__decay_steps": 4,
    "mesh__data": -1,
    "mesh__fsdp": 1,
    "model__num_layers": 1,
    "model__layer_pattern": "lightning",
    "model__num_experts": 0,
    "model__experts_per_token": 0,
    "data__validation_fraction": 0.0,
    "metrics__evaluate_every_steps": 100,
    "metrics__sample_tokens": 0,
    "checkpoints__every_steps": 2,
}
SLOWLY = {"WAIT": "1"}  # so that a run is not done before it is disturbed
TRAIN = str(tiny_run.REPOSITORY / "tests" / "recorded_train.py")
HERE = socket.gethostname()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Corpora, and in `whole` a run on two hosts that nothing interrupted."""
    folder = tmp_path_factory.mktemp("hosts")
    tiny_run.write_corpus(folder)
    with hosts(folder, "whole", 2) as processes:
        codes, said = ends(processes)
    assert codes == [0, 0], said
    return folder


@contextlib.contextmanager
def hosts(folder: pathlib.Path, name: str, count: int, *, differ=(), environment=(), **settings):
    """The hosts of a run, together with four devices; `differ` and `environment` are for the last of them."""
    arguments = tiny_run.arguments(folder, name, **SETTINGS | settings)
    processes = []
    with reserved_port() as port:
        try:
            for index in range(count):
                last = index == count - 1
                processes.append(
                    subprocess.Popen(
                        [sys.executable, TRAIN, *arguments, *(differ if last else ())],
                        env=host_environment(index, count, port, devices=4 // count)
                        | {"PYTHONPATH": str(tiny_run.REPOSITORY), "RECORD_ROWS": str(folder / f"{name}.rows")}
                        | dict(environment if last else ()),
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                )
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def ends(processes) -> tuple[list[int], list[str]]:
    """The exit codes and what was said."""
    said = [process.communicate(timeout=400)[0] for process in processes]
    return [process.returncode for process in processes], said


def wait_for_steps(run: pathlib.Path, step: int, processes) -> None:
    """Until a checkpoint of `step` or a later one is committed."""
    end = time.monotonic() + 400
    while not any(path.name.isdecimal() and int(path.name) >= step for path in run.glob("checkpoints/*")):
        assert all(process.poll() is None for process in processes), ends(processes)
        assert time.monotonic() < end
        time.sleep(0.02)


def losses(run: pathlib.Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def fingerprints(run: pathlib.Path) -> dict[str, str]:
    """Of every array of the last checkpoint."""
    manifest = json.loads((run / "checkpoints" / str(STEPS) / "MANIFEST.json").read_text())
    return {name: leaf["fingerprint"] for name, leaf in manifest["leaves"].items()}


def batches(folder: pathlib.Path, name: str) -> dict[int, list[str]]:
    """The rows of the global batch of each step, in order; a step that was made again had the same ones."""
    parts: dict[tuple[int, int], dict[int, list[str]]] = {}  # by step and number of rows
    for line in (folder / f"{name}.rows").read_text().splitlines():
        record = json.loads(line)
        rows = parts.setdefault((record["step"], len(record["rows"])), {})
        assert rows.setdefault(record["part"], record["rows"]) == record["rows"]
    found: dict[int, list[str]] = {}
    for (step, _), rows in sorted(parts.items()):
        if len(whole := [row for _, part in sorted(rows.items()) for row in part]) == ROWS:
            assert found.setdefault(step, whole) == whole
    return found


def test_a_host_that_is_killed_is_named_by_the_others_and_the_resumed_run_has_the_same_bits(folder):
    with hosts(folder, "killed", 2, environment=SLOWLY) as processes:
        wait_for_steps(folder / "killed", 4, processes)
        killed_at = time.monotonic()
        processes[0].kill()  # the one that the others talk to
        codes, said = ends(processes)
        assert time.monotonic() - killed_at < 60
    assert codes == [-signal.SIGKILL, RESTART], said
    assert said[1].splitlines()[-1] == f"error: host 0 ({HERE}) is gone: it was killed, or its machine failed"
    with hosts(folder, "killed", 2) as processes:
        codes, said = ends(processes)
    assert codes == [0, 0], said
    assert "resumed from the checkpoint of step" in said[0]
    assert batches(folder, "killed") == batches(folder, "whole")
    assert losses(folder / "killed") == losses(folder / "whole")
    assert fingerprints(folder / "killed") == fingerprints(folder / "whole")


def test_four_hosts_become_two_and_then_one_with_the_same_data_and_losses(folder):
    run = folder / "elastic"
    with hosts(folder, "elastic", 4, environment=SLOWLY) as processes:
        wait_for_steps(run, 2, processes)
        processes[2].kill()
        codes, said = ends(processes)
    assert codes == [RESTART, RESTART, -signal.SIGKILL, RESTART], said
    for index in (0, 1, 3):
        assert f"error: host 2 ({HERE}) is gone: it was killed, or its machine failed" in said[index]
    with hosts(folder, "elastic", 2, environment=SLOWLY) as processes:
        wait_for_steps(run, 6, processes)
        processes[1].send_signal(signal.SIGTERM)  # to one of them alone
        codes, said = ends(processes)
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert "stopped and saved at step" in said[0]
    with hosts(folder, "elastic", 1) as processes:
        codes, said = ends(processes)
    assert codes == [0], said
    assert batches(folder, "elastic") == batches(folder, "whole")
    found, expected = losses(run), losses(folder / "whole")
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)


def test_a_host_that_hangs_is_named_and_every_host_prints_its_stacks(folder):
    with hosts(folder, "hangs", 2, hang_minutes=0.5, environment={"HANG_AT": "6"}) as processes:
        wait_for_steps(folder / "hangs", 4, processes)
        began = time.monotonic()
        codes, said = ends(processes)
    assert time.monotonic() - began < 60
    assert codes == [RESTART] * 2, said
    for each in said:
        assert each.splitlines()[-1].startswith(
            f"error: nothing was done for 30 s: host 1 ({HERE}), beginning the step at step 6; host 0 ({HERE}), "
        )
    assert "in recorded" in said[1]
    assert "in _report" in said[0]


def test_another_config_on_one_host_is_a_line_that_names_it(folder):
    with hosts(folder, "differs", 2, differ=["--config.seed=1"]) as processes:
        codes, said = ends(processes)
    assert codes == [2, 2], said
    for each in said:
        assert each.splitlines()[-1] == f"error: host 1 ({HERE}) differs: config.seed is 1, and 0 elsewhere"
    assert not (folder / "differs").exists()


def test_a_host_that_does_not_come_is_named(folder):
    arguments = [*tiny_run.arguments(folder, "missing"), "--join_timeout=2"]
    with reserved_port() as port:
        alone = subprocess.run(
            [sys.executable, "-m", "lightning_jax.train", *arguments],
            env=host_environment(0, 2, port, devices=1) | {"PYTHONPATH": str(tiny_run.REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert alone.returncode == RESTART
    assert alone.stderr == f"error: host 1 of 2 did not come within 2 s; here: host 0 ({HERE})\n"
