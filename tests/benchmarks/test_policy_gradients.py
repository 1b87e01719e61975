"""The fork of benchmarks/policy_gradients.py, in two minutes: CISPO learns it, and a clip of the ratio delays it."""

import json
import os
import pathlib
import subprocess
import sys

import forgotten_carries
import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
LESS = ["--algorithms", "CISPO", "DAPO", "--seeds=1", "--rates", "3e-4:3", "--passes=3"]


def test_the_fork_is_where_the_right_answer_leaves_the_forgetful_one():
    right, forgetful = (forgotten_carries.answer(47, 38, carry=carry) for carry in (True, False))
    assert (right, forgetful) == ("7+8=15 4+3+1=8 85", "7+8=15 4+3=7 75")
    assert forgotten_carries.answer(95, 17, carry=True) == "5+7=12 9+1+1=11 112"
    assert forgotten_carries.fork(47, 38) == right.index("+1=8")


@pytest.mark.slow
def test_reward_teaches_a_rare_fork_and_a_clip_of_the_ratio_delays_it(tmp_path):
    script = str(REPOSITORY / "benchmarks" / "policy_gradients.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, script, *LESS, f"--folder={tmp_path}", f"--results={tmp_path}"]
    subprocess.run(command, env=environment, check=True, timeout=600)
    figures = json.loads((tmp_path / "policy_gradients.json").read_text())
    assert (tmp_path / "policy_gradients.png").exists()
    (curves,), (shares,) = figures["curves"].values(), figures["moved"].values()
    (cispo,), (dapo,) = curves["CISPO"], curves["DAPO"]
    assert cispo["held_out"][-1] > cispo["held_out"][0] + 0.2
    assert cispo["reward"][1] > dapo["reward"][1] + 0.1
    assert max(cispo["clip_share"]) == 0
    assert max(dapo["clip_share"]) > max(cispo["cap_share"])
    for each in shares.values():
        assert each["right forks"] > 2 * each["other tokens"]
