"""A share of the devices makes rollouts while the others train: the same numbers, at the same time."""

import json
import pathlib
import shutil
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import tiny_reinforcement
import tiny_run
from tiny_reinforcement import UPDATES

from lightning_jax import train
from lightning_jax.config_reader import load_config
from lightning_jax.mesh_problems import problems_on
from lightning_jax.programs import Programs
from lightning_jax.reinforcement.collecting import Collector

STEPS = 10
ROLLOUTS = "stages__rl__reinforcement__rollouts"
FOUR = {"mesh__data": 1, "mesh__fsdp": 4, f"{ROLLOUTS}__staleness": 1}
SHARE = FOUR | {f"{ROLLOUTS}__devices": "{fsdp:4}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Prompts, and in `share` a run in which four of eight devices make rollouts."""
    folder = tmp_path_factory.mktemp("rollout_devices")
    tiny_reinforcement.write_prompts(folder)
    return folder


@pytest.fixture(scope="module")
def share(folder) -> pathlib.Path:
    assert train.main(tiny_reinforcement.arguments(folder, "share", steps=STEPS, **SHARE)) == 0
    return folder / "share"


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
def test_four_devices_beside_four_give_the_bits_of_four_that_do_both(folder, share):
    arguments = tiny_reinforcement.arguments(folder, "in_turns", steps=STEPS, **FOUR)
    tiny_run.finish(tiny_run.start(arguments, num_devices=4))
    assert ending(share) == ending(folder / "in_turns")
    assert sum(row.get("refills", 0) for row in ending(share)["metrics"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6])
def test_going_on_gives_the_same_bits(folder, share, step):
    assert step % UPDATES
    run = folder / f"resumed_{step}"
    shutil.copytree(share, run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    assert train.main(tiny_reinforcement.arguments(folder, run.name, steps=STEPS, **SHARE)) == 0
    assert ending(run) == ending(share)


@pytest.mark.slow
def test_the_next_generation_is_made_while_the_present_one_is_trained_on(folder, monkeypatch):
    """It waits here for the second update on the present one, and would wait for ever if that waited for it."""
    updates, generate, train_step, waited = threading.Semaphore(0), Collector.generate, Programs.train_step, []

    def generate_late(self, generation, position):
        if generation:
            waited.append(all(updates.acquire(timeout=60) for _ in range(2)))
        return generate(self, generation, position)

    def counted(self, stage, rows):
        step = train_step(self, stage, rows)
        return lambda *arguments: (step(*arguments), updates.release())[0]

    monkeypatch.setattr(Collector, "generate", generate_late)
    monkeypatch.setattr(Programs, "train_step", counted)
    more = SHARE | {"checkpoints__every_steps": 0, "metrics__evaluate_every_steps": 1000}
    assert train.main(tiny_reinforcement.arguments(folder, "meanwhile", steps=2 * UPDATES, **more)) == 0
    assert waited == [True]


@pytest.mark.slow
def test_a_run_that_fails_does_not_wait_for_rollouts_made_ahead(folder, monkeypatch):
    generate, ended = Collector.generate, []

    def generate_for_a_minute(self, generation, position):
        if not generation:
            return generate(self, generation, position)
        try:
            for _ in range(6000):
                self._generator._progress("making rollouts")
                time.sleep(0.01)
        except CancelledError:
            ended.append(generation)
            raise

    def failing(self, stage, rows):
        def step(*arguments):
            raise RuntimeError("a device is gone")

        return step

    monkeypatch.setattr(Collector, "generate", generate_for_a_minute)
    monkeypatch.setattr(Programs, "train_step", failing)
    with pytest.raises(RuntimeError, match="a device is gone"):
        train.main(tiny_reinforcement.arguments(folder, "failing", steps=2 * UPDATES, **SHARE))
    assert ended == [1]


@pytest.mark.slow
def test_a_share_laid_out_otherwise_makes_the_same_tokens(folder, share):
    more = SHARE | {f"{ROLLOUTS}__devices": "{data:2,expert:2}", f"{ROLLOUTS}__staleness": 0}
    assert train.main(tiny_reinforcement.arguments(folder, "in_order", steps=UPDATES, **more)) == 0
    one, other = (np.load(run / "rollouts" / "rl_0.npz") for run in (share, folder / "in_order"))
    for name in ("inputs", "targets", "loss_mask", "advantages"):
        np.testing.assert_array_equal(one[name], other[name])
    np.testing.assert_allclose(one["recorded_log_probs"], other["recorded_log_probs"], atol=1e-5)


def test_what_cannot_be_is_told_in_a_line(folder, capsys):
    for more, message in (
        ({"devices": "{sequence:2}"}, "devices.sequence: no axis; there is data, fsdp, expert, expert_tensor, tensor"),
        ({"devices": "{tensor:0}"}, "devices.tensor: 0 is not positive"),
        ({"devices": "{fsdp:4}", "mode": "exact"}, "devices: exact rollouts are drawn by the training forward"),
    ):
        more = {f"{ROLLOUTS}__{name}": value for name, value in more.items()}
        assert train.main(tiny_reinforcement.arguments(folder, "mistaken", steps=STEPS, **more)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("{fsdp:8}", "config.stages.rl.reinforcement.rollouts.devices: 8 of 8 devices leave none to train on"),
        ("{fsdp:3}", "config.mesh: fsdp=4 needs 4 devices, 5 were found"),
        ("{tensor:4}", "config.model.num_kv_heads: 1 does not divide over mesh stages.rl.reinforcement.rollouts"),
    ],
)
def test_a_share_must_leave_devices_and_divide_the_model(folder, share, message):
    settings = [
        flag.removeprefix("--config.")
        for flag in tiny_reinforcement.arguments(folder, "", steps=STEPS, **FOUR, **{f"{ROLLOUTS}__devices": share})
        if flag.startswith("--config.")
    ]
    problems = problems_on(load_config(tiny_reinforcement.CONFIG, settings), 8)
    assert any(problem.startswith(message) for problem in problems), problems


def test_stages_of_one_run_share_one_mesh(folder, capsys):
    more = SHARE | {"run_stages": "sft,rl"}
    assert train.main(tiny_reinforcement.arguments(folder, "mistaken", steps=STEPS, **more)) == 2
    assert "rollouts.devices differs between stages, whose mesh is of all other devices" in capsys.readouterr().err
