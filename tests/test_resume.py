"""A run that was killed ends bit for bit as one that never was."""

import json
import pathlib
import random
import signal
import time

import numpy as np
import pytest
import tiny_run

LAST_STEP = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Corpora, and in `whole` the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_run.write_corpus(folder)
    tiny_run.finish(tiny_run.start(tiny_run.arguments(folder, "whole")))
    return folder


def _metrics(run: pathlib.Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "timing"} for record in records]


def _fingerprints(run: pathlib.Path) -> dict[str, str]:
    """Of every array of the last checkpoint: parameters, moments and counters."""
    manifest = json.loads((run / "checkpoints" / str(LAST_STEP) / "MANIFEST.json").read_text())
    return {name: leaf["fingerprint"] for name, leaf in manifest["leaves"].items()}


def _wait_until(condition, process, seconds=120.0) -> bool:
    """Whether `condition` came true before the process ended."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "the run makes no progress"
        time.sleep(0.001)
    return True


def _run_with_kills(folder: pathlib.Path, name: str, kills: int, seed: int) -> int:
    """Kills the run at random moments, every third one during a save; then lets it end. Returns the kills made."""
    moments = random.Random(seed)
    arguments, run = tiny_run.arguments(folder, name), folder / name
    made = 0
    for attempt in range(kills):
        seen = len(_metrics(run)) if (run / "metrics.jsonl").exists() else 0
        process = tiny_run.start(arguments)
        if attempt % 3 == 2:
            alive = _wait_until(lambda: any((run / "checkpoints").glob("*.saving")), process)
        else:
            more = moments.randrange(1, max(2, LAST_STEP // kills + 3))
            alive = _wait_until(
                lambda goal=seen + more: (
                    (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= goal
                ),
                process,
            )
        process.kill()
        process.communicate()
        made += alive
    tiny_run.finish(tiny_run.start(arguments))
    return made


def _assert_equal_runs(folder: pathlib.Path, name: str) -> None:
    assert _fingerprints(folder / name) == _fingerprints(folder / "whole")
    assert _metrics(folder / name) == _metrics(folder / "whole")
    assert (folder / name / "samples.jsonl").read_bytes() == (folder / "whole" / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_same_bits(folder):
    assert _run_with_kills(folder, "killed_thrice", kills=3, seed=0) == 3
    _assert_equal_runs(folder, "killed_thrice")


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_bits(folder):
    made = _run_with_kills(folder, "killed", kills=20, seed=1)
    assert made >= 15  # a run may end before its last kills
    _assert_equal_runs(folder, "killed")


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(folder):
    arguments, run = tiny_run.arguments(folder, "terminated", checkpoints__every_steps=0), folder / "terminated"
    process = tiny_run.start(arguments)
    assert _wait_until(lambda: (run / "metrics.jsonl").exists() and len(_metrics(run)) > 5, process)
    process.send_signal(signal.SIGTERM)
    output = tiny_run.finish(process, expected=128 + signal.SIGTERM)
    assert "the same command goes on from there" in output
    assert "resumed from the checkpoint of step" in tiny_run.finish(tiny_run.start(arguments))
    _assert_equal_runs(folder, "terminated")


@pytest.mark.slow
def test_moving_from_one_to_eight_and_to_two_data_shards_changes_no_number_beyond_rounding(folder):
    arguments, run = tiny_run.arguments(folder, "moved", mesh__data=-1, mesh__fsdp=1), folder / "moved"
    for num_devices, goal in ((1, 12), (8, 25)):
        process = tiny_run.start(arguments, num_devices)
        assert _wait_until(lambda goal=goal: (run / "metrics.jsonl").exists() and len(_metrics(run)) >= goal, process)
        process.send_signal(signal.SIGTERM)
        tiny_run.finish(process, expected=128 + signal.SIGTERM)
    output = tiny_run.finish(tiny_run.start(arguments, 2))
    assert "2 x cpu, split: data 2" in output
    whole, moved = _metrics(folder / "whole"), _metrics(run)
    assert [record["step"] for record in moved] == [record["step"] for record in whole]
    for a, b in zip(moved, whole, strict=True):
        if "loss" in a:
            assert a["tokens"] == b["tokens"]
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
