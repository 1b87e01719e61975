"""PPO with stale rollouts and refills on two hosts: the tokens of one host, and the same bits when it goes on."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import tiny_reinforcement
import tiny_run
from test_ppo import PPO, SETTINGS, fingerprints, metrics
from tiny_reinforcement import UPDATES
from two_hosts import on_two_hosts

STEPS = 2 * UPDATES
MORE = PPO | {
    "mesh__data": 1,
    "mesh__fsdp": 4,
    f"{SETTINGS}__rollouts__epochs": 1,
    f"{SETTINGS}__rollouts__samples": 4,
    f"{SETTINGS}__rollouts__dynamic_sampling": True,
    f"{SETTINGS}__rollouts__staleness": 1,
}


def arguments(folder: pathlib.Path, workdir: str, **more: object) -> list[str]:
    return tiny_reinforcement.arguments(folder, workdir, steps=STEPS, **(MORE | more))


def command(folder: pathlib.Path, workdir: str, **more: object) -> list[str]:
    return [sys.executable, "-m", "lightning_jax.train", *arguments(folder, workdir, **more)]


@pytest.mark.slow
def test_two_hosts_make_the_tokens_of_one_and_go_on_with_the_same_bits(tmp_path):
    tiny_reinforcement.write_prompts(tmp_path)
    on_two_hosts(command(tmp_path, "two"))
    tiny_run.finish(tiny_run.start(arguments(tmp_path, "one"), num_devices=4))
    for generation in range(2):
        one, two = (np.load(tmp_path / run / "rollouts" / f"rlvr_{generation}.npz") for run in ("one", "two"))
        for name in ("inputs", "targets", "loss_mask"):
            np.testing.assert_array_equal(one[name], two[name])
    assert [row["refills"] for row in metrics(tmp_path / "two") if "refills" in row] == [1, 1]
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for name in ("loss", "value_loss", "reward", "gradient_norm"):
            assert one.get(name, 0) == pytest.approx(two.get(name, 0), abs=1e-4)

    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "two", resumed)
    for path in (resumed / "checkpoints").iterdir():
        if int(path.name) > 3:
            shutil.rmtree(path)
    on_two_hosts(command(tmp_path, resumed.name))
    assert fingerprints(resumed, STEPS) == fingerprints(tmp_path / "two", STEPS)
    assert metrics(resumed) == metrics(tmp_path / "two")


@pytest.mark.slow
def test_a_share_of_the_devices_is_refused_on_two_hosts(tmp_path):
    tiny_reinforcement.write_prompts(tmp_path)
    more = {"mesh__fsdp": 2, f"{SETTINGS}__rollouts__devices": json.dumps({"fsdp": 2}).replace('"', "")}
    for said in on_two_hosts(command(tmp_path, "refused", **more), code=2):
        assert "which a run of one process can do, and this is one of 2" in said.error
