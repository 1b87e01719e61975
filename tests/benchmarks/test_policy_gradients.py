"""The fork of benchmarks/policy_gradients.py, in two minutes: CISPO learns it."""

import json
import os
import pathlib
import subprocess
import sys

import forgotten_carries
import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
LESS = ["--settings=common", "--algorithms", "CISPO", "DAPO", "--seeds=1", "--generations=8", "--passes=7"]


def test_the_fork_is_where_the_right_sum_leaves_the_forgetful_one():
    assert forgotten_carries.without_carry(47, 38) == "75"
    assert forgotten_carries.without_carry(95, 17) == "02"
    assert [forgotten_carries.fork(*pair) for pair in ((47, 38), (95, 17), (20, 91))] == [0, 0, 2]


@pytest.mark.slow
def test_reward_teaches_the_carry_and_only_a_ratio_clip_leaves_tokens_out(tmp_path):
    script = str(REPOSITORY / "benchmarks" / "policy_gradients.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, script, *LESS, "--learning_rate=3e-4", f"--folder={tmp_path}", f"--results={tmp_path}"]
    subprocess.run(command, env=environment, check=True, timeout=600)
    figures = json.loads((tmp_path / "policy_gradients.json").read_text())
    assert (tmp_path / "policy_gradients.png").exists()
    curves = figures["curves"]["common"]
    for cispo, dapo in zip(curves["CISPO"], curves["DAPO"], strict=True):
        assert cispo["held_out"][-1] > cispo["held_out"][0] + 0.2
        assert max(cispo["clip_share"]) == 0
        assert max(dapo["clip_share"]) > max(cispo["cap_share"])
    for shares in figures["moved"]["common"].values():
        assert shares["right carries"] > 2 * shares["other tokens"]
