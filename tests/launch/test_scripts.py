"""The launch scripts with the programs they call replaced by ones that say how they were called; the manifests."""

import os
import pathlib
import shutil
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts programs on the path which write their arguments into `calls` and then do as told; returns that file."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def put(**programs: str) -> pathlib.Path:
        for name, then in programs.items():
            (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$*" >> {tmp_path}/calls\n{then}\n')
            (tmp_path / name).chmod(0o755)
        return tmp_path / "calls"

    return put


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (143, 3, True), (75, 20, False)],
)
def test_a_slurm_job_goes_back_into_the_queue_unless_there_is_nothing_to_gain(stand_in, code, restarts, requeued):
    calls = stand_in(srun=f"exit {code}", scontrol="true")
    done = run("slurm.sh", "--config=c.py", "--workdir=a b", SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code, done.stderr
    first, *others = calls.read_text().splitlines()
    assert first.startswith("srun --label")
    assert first.endswith("-m lightning_jax.train --config=c.py --workdir=a b")
    assert others == ["scontrol requeue 7"] * requeued


@pytest.mark.parametrize(("codes", "last"), [((75, 134, 0), 0), ((2,), 2), ((75, 143), 143), ((137,) * 3, 137)])
def test_a_command_is_run_again_while_that_helps(stand_in, codes, last):
    count = '[ $(wc -l < "$(dirname "$0")/calls") = {} ] && exit {}'
    calls = stand_in(trains="\n".join(count.format(n, code) for n, code in enumerate(codes, 1)))
    done = run("keep_running.sh", "trains", "--seed=1", MAX_RESTARTS="2", RESTART_SECONDS="0")
    assert done.returncode == last
    assert calls.read_text().splitlines() == ["trains --seed=1"] * len(codes)


def test_a_tpu_slice_is_asked_for_installed_and_trained_on(stand_in):
    calls = stand_in(gcloud='case "$*" in *describe*) echo ACTIVE ;; esac')
    place = {"NAME": "m1", "ZONE": "z", "TYPE": "v5p-16", "VERSION": "v2-alpha-tpuv5", "NFS": "10.0.0.2:/runs"}
    for arguments in (
        ["create", "--spot"],
        ["install"],
        ["train", "--config=c.py:8b", "--workdir=/mnt/runs/a b"],
        ["stop"],
    ):
        done = run("tpu.sh", *arguments, **place)
        assert done.returncode == 0, done.stderr
    said = " ".join(calls.read_text().split())
    assert "queued-resources create m1 --node-id=m1 --zone=z --accelerator-type=v5p-16" in said
    assert "--runtime-version=v2-alpha-tpuv5 --spot gcloud" in said
    assert "lightning_jax.tar.gz m1: --zone=z --worker=all" in said
    assert "mount -o hard '10.0.0.2:/runs' /mnt/runs" in said
    assert "lightning_jax.train --config=c.py:8b --workdir=/mnt/runs/a\\ b >> ~/train.log" in said
    assert "pkill -TERM" in said


def test_several_tpu_slices_are_one_run(stand_in):
    calls = stand_in(gcloud='case "$*" in *describe*) echo ACTIVE ;; esac')
    place = {"NAME": "m1", "ZONE": "z", "TYPE": "v6e-256", "VERSION": "v2-alpha-tpuv6e", "SLICES": "2"}
    for arguments in (["create"], ["train", "--config=c.py:8b"], ["log"]):
        done = run("tpu.sh", *arguments, **place)
        assert done.returncode == 0, done.stderr
    said = " ".join(calls.read_text().split())
    assert "queued-resources create m1 --node-prefix=m1 --node-count=2 --zone=z" in said
    for slice_ in ("m1-0", "m1-1"):
        assert f"ssh {slice_} --zone=z --worker=all --command=cd lightning_jax && . launch/xla_flags.sh" in said
    assert "ssh m1-0 --zone=z --worker=0 --command=tail" in said


def test_a_tpu_slice_that_is_not_to_be_had_ends_the_wait(stand_in):
    stand_in(gcloud='case "$*" in *describe*) echo FAILED ;; esac')
    done = run("tpu.sh", "create", NAME="m1", ZONE="z", TYPE="v6e-8", VERSION="v2-alpha-tpuv6e")
    assert (done.returncode, done.stderr) == (1, "m1 is FAILED\n")


def test_what_a_script_can_do_is_said_to_who_asks_otherwise(stand_in):
    done = run("tpu.sh", "help", NAME="m1", ZONE="z")
    assert done.returncode == 2
    assert "launch/tpu.sh train" in done.stderr


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_the_hosts_of_a_manifest_are_counted_the_same_everywhere(manifest):
    jobset = yaml.safe_load(manifest.read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [1, 2],
    }
    environment = {each["name"]: each.get("value") for each in container.get("env", [])}
    if "google.com/tpu" in container["resources"]["limits"]:
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        chips = 1
        for size in topology.split("x"):
            chips *= int(size)
        assert chips == spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
    else:
        assert environment["JAX_NUM_PROCESSES"] == str(spec["completions"])
        host, _, port = environment["JAX_COORDINATOR_ADDRESS"].partition(":")
        name = jobset["metadata"]["name"]
        assert host == f"{name}-{job['name']}-0-0.{name}"
        assert int(port) == container["ports"][0]["containerPort"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
