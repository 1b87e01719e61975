"""A run of reinforcement learning that is killed at random ends bit for bit as one that never was."""

import json
import pathlib
import random
import signal

import pytest
import tiny_reinforcement
import tiny_run

STEPS = 10
KILLED = str(pathlib.Path(__file__).parent / "killed_train.py")
# The latest that may come before the end of the first generation, its updates or its checkpoint.
LATEST = {"decode": 12, "update": 5, "sync": 60}


def ending(run: pathlib.Path) -> dict:
    """Every array's fingerprint at the end, everything measured but times, and every sample."""
    manifest = json.loads((run / "checkpoints" / str(STEPS) / "MANIFEST.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "arrays": {name: leaf["fingerprint"] for name, leaf in manifest["leaves"].items()},
        "metrics": [{name: value for name, value in record.items() if name != "timing"} for record in records],
        "samples": (run / "samples.jsonl").read_text(),
    }


@pytest.mark.slow
def test_a_run_killed_in_generations_updates_and_writes_ends_with_the_same_bits(tmp_path, monkeypatch):
    tiny_reinforcement.write_prompts(tmp_path)
    tiny_run.finish(tiny_run.start(tiny_reinforcement.arguments(tmp_path, "whole", steps=STEPS)))
    arguments = tiny_reinforcement.arguments(tmp_path, "killed", steps=STEPS)
    moments, killed = random.Random(0), []
    for kind in ("decode", "sync", "update", "sync", "decode", "update"):
        monkeypatch.setenv("KILL_AT", f"{kind} {moments.randint(1, LATEST[kind])}")
        process = tiny_run.start(arguments, program=[KILLED])
        output = process.communicate(timeout=300)[0]
        assert process.returncode in (0, -signal.SIGKILL), output
        killed += [kind] if process.returncode else []
    tiny_run.finish(tiny_run.start(arguments))
    assert {"decode", "sync", "update"} == set(killed)
    assert ending(tmp_path / "killed") == ending(tmp_path / "whole")
