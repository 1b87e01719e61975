"""Reinforcement learning as a user runs it: it learns, and goes on in the middle of a generation with the same bits."""

import json
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest
import tiny_reinforcement
import tiny_run
from tiny_reinforcement import UPDATES

from lightning_jax import train

pytestmark = pytest.mark.slow
STEPS = 10
# A model that has learned nothing is never right, so what it is rewarded for here is that it stops.
STOPPING = {
    "stages__rl__reinforcement__rewards__weights": "{gsm8k:0}",
    "stages__rl__reinforcement__rewards__unfinished": "subtract",
    "stages__rl__reinforcement__rewards__unfinished_score": 1.0,
    "stages__rl__reinforcement__rollouts__samples": 8,
}
TWO_HEADS = {"model__num_kv_heads": 2}  # which axis "tensor" can divide


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Prompts, and in `whole` the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reinforcement")
    tiny_reinforcement.write_prompts(folder)
    assert train.main(tiny_reinforcement.arguments(folder, "whole", steps=STEPS)) == 0
    return folder


def lines(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def metrics(run):
    return [{name: value for name, value in row.items() if name != "timing"} for row in lines(run, "metrics.jsonl")]


def fingerprints(run):
    manifest = json.loads((run / "checkpoints" / str(STEPS) / "MANIFEST.json").read_text())
    return {name: leaf["fingerprint"] for name, leaf in manifest["leaves"].items()}


def assert_equal_runs(one, other):
    assert fingerprints(one) == fingerprints(other)
    assert metrics(one) == metrics(other)
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()


def cut_back(folder, name, step):
    """A copy of the run as if it had been killed after `step` was saved."""
    run = folder / name
    shutil.copytree(folder / "whole", run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    for generation in range(step // UPDATES + 1, STEPS):
        (run / "rollouts" / f"rl_{generation}.npz").unlink(missing_ok=True)
    return run


def test_going_on_in_the_middle_of_a_generation_gives_the_same_bits(folder):
    assert 6 % UPDATES
    run = cut_back(folder, "resumed", 6)
    assert train.main(tiny_reinforcement.arguments(folder, run.name, steps=STEPS)) == 0
    assert_equal_runs(run, folder / "whole")


def test_rollouts_that_are_not_the_runs_own_are_refused(folder, capsys):
    run = cut_back(folder, "foreign", 6)
    rollouts = run / "rollouts" / "rl_1.npz"
    with np.load(rollouts) as file:
        rows = dict(file)
    rows["advantages"] = -rows["advantages"] + 1
    np.savez(rollouts, **rows)
    assert train.main(tiny_reinforcement.arguments(folder, run.name, steps=STEPS)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(rollouts) in line
    assert "missing, damaged or of another run" in line


def test_a_run_that_is_told_to_stop_goes_on_with_the_same_bits(folder):
    arguments, run = tiny_reinforcement.arguments(folder, "stopped", steps=STEPS), folder / "stopped"
    process = tiny_run.start(arguments, num_devices=8)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(metrics(run)) > 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = tiny_run.finish(process, expected=128 + signal.SIGTERM)
    assert "the same command goes on from there" in output
    tiny_run.finish(tiny_run.start(arguments, num_devices=8))
    assert_equal_runs(run, folder / "whole")


def test_what_is_rewarded_is_done_more_often_and_is_on_record(folder, capsys):
    more = STOPPING | {"stages__rl__schedule__peak": 1e-2, "stages__rl__schedule__final": 1e-2}
    more |= {"stages__rl__schedule__warmup_steps": 0}
    steps = 15 * UPDATES
    arguments = tiny_reinforcement.arguments(folder, "stopping", steps=steps, checkpoints__every_steps=0, **more)
    assert train.main(arguments) == 0
    rows = [row for row in lines(folder / "stopping", "metrics.jsonl") if "reward" in row]
    assert len(rows) == steps // UPDATES
    assert np.mean([row["score"] for row in rows[-3:]]) > np.mean([row["score"] for row in rows[:3]]) + 0.3
    assert np.mean([row["completion_tokens"] for row in rows[-3:]]) < rows[0]["completion_tokens"]
    assert all(row["probability_correlation"] > 0.999 for row in rows)
    assert {"generation_seconds", "reward_seconds", "generated_tokens_per_second"} <= rows[0]["timing"].keys()
    sample = lines(folder / "stopping", "samples.jsonl")[0]
    assert {"prompt", "text", "reward", "reason", "score", "advantage", "finish_reason"} <= sample.keys()
    assert "validation reward" in capsys.readouterr().out


def updates(run):
    return [row for row in metrics(run) if "surrogate" in row]


@pytest.fixture(scope="module")
def one_device(folder) -> pathlib.Path:
    """A run of one generation on one device."""
    arguments = tiny_reinforcement.arguments(folder, "one_device", steps=UPDATES, **TWO_HEADS)
    tiny_run.finish(tiny_run.start(arguments, num_devices=1))
    return folder / "one_device"


def test_completions_that_share_rows_teach_the_same(folder, one_device):
    more = TWO_HEADS | {"stages__rl__mixture__packing": "best_fit"}
    tiny_run.finish(tiny_run.start(tiny_reinforcement.arguments(folder, "packed", steps=UPDATES, **more)))
    for together, apart in zip(updates(folder / "packed"), updates(one_device), strict=True):
        assert together["targets"] == apart["targets"]
        for name in ("loss", "surrogate", "entropy", "gradient_norm"):
            np.testing.assert_allclose(together[name], apart[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_exact_rollouts_are_the_trainers_on_every_mesh(folder, layout, capsys):
    mesh = {"mesh__data": 1, "mesh__fsdp": 1} | {f"mesh__{axis}": size for axis, size in layout.items()}
    name = "exact_" + "_".join(layout)
    more = {"stages__rl__reinforcement__rollouts__mode": "exact"} | TWO_HEADS
    assert train.main(tiny_reinforcement.arguments(folder, name, steps=UPDATES, **mesh, **more)) == 0
    (generation,) = [row for row in metrics(folder / name) if "reward" in row]
    assert generation["log_prob_gap_max"] == 0
    # Where a device has a single row, the program of the gradient is fused otherwise, and LLVM adds up a norm's squares
    # in another order: a rounding of fp32, 1e-7 nats, squared.
    assert updates(folder / name)[0]["policy_change"] < 1e-13
    assert "exact rollouts" not in capsys.readouterr().out


def test_rollouts_on_a_mesh_have_the_tokens_of_one_device(folder, one_device):
    layout = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    arguments = tiny_reinforcement.arguments(folder, "eight_devices", steps=UPDATES, **layout, **TWO_HEADS)
    assert train.main(arguments) == 0
    one, eight = (np.load(run / "rollouts" / "rl_0.npz") for run in (one_device, folder / "eight_devices"))
    for name in ("inputs", "targets", "loss_mask", "advantages"):
        np.testing.assert_array_equal(one[name], eight[name])
    np.testing.assert_allclose(one["recorded_log_probs"], eight["recorded_log_probs"], atol=1e-5)


@pytest.mark.parametrize(("place", "estimator"), [("loss", "k3"), ("reward", "k1")])
def test_a_divergence_is_measured_from_the_model_as_the_stage_began(folder, place, estimator):
    settings = {"kl_coefficient": 0.1, "kl_in": place, "kl_estimator": estimator}
    more = {f"stages__rl__reinforcement__policy_gradient__{key}": value for key, value in settings.items()}
    run = folder / f"divergence_{place}"
    arguments = tiny_reinforcement.arguments(folder, run.name, steps=STEPS, **STOPPING, **more)
    assert train.main(arguments) == 0
    if place == "reward":
        return
    rows = [row for row in metrics(run) if "loss" in row]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert max(row["kl"] for row in rows) > 1e-6
    expected = fingerprints(run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > 6:
            shutil.rmtree(path)
    assert train.main(arguments) == 0
    assert fingerprints(run) == expected


def test_mistakes_are_told_in_a_line(folder, capsys):
    prefix = "stages__rl__reinforcement"
    for more, message in (
        ({f"{prefix}__rewards__weights": "{gsm8q:1}"}, "rewards.weights.gsm8q: no such reward; did you mean 'gsm8k'?"),
        ({f"{prefix}__rollouts__samples": 3}, "3 do not divide the 32 completions of a generation"),
        ({f"{prefix}__rollouts__mode": "aligned"}, "'aligned' needs XLA_FLAGS=--xla_allow_excess_precision=false"),
        ({f"{prefix}__rollouts__max_new_tokens": 47}, "no prompt to train on"),
        ({f"{prefix}__policy_gradient__is_weight_max": 0.2}, "is_weight_max: 0.2 is an absolute cap"),
    ):
        arguments = tiny_reinforcement.arguments(folder, "mistaken", steps=STEPS, **more)
        assert train.main(arguments) == 2
        assert message in capsys.readouterr().err
