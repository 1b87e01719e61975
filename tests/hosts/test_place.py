"""Each way to learn which host this is; SLURM's variables as a task of srun has them."""

import pytest

from lightning_jax.errors import UserError
from lightning_jax.hosts.place import Place, find_place

TASK = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[007-009,012]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x4)",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}


def test_a_process_that_nobody_placed_is_alone():
    assert find_place(environment={}) is None
    assert find_place(count=1, environment={"JAX_NUM_PROCESSES": "4"}) is None


def test_flags_come_before_variables():
    variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}
    assert find_place(environment=variables) == Place("a:1", 4, 0, None)
    assert find_place("b:2", index=3, environment=variables) == Place("b:2", 4, 3, None)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"address": "a:1"}, "--num_processes, --process_id: not given, and nothing here tells"),
        ({"address": "a:1", "count": 2, "index": 2}, "--process_id=2: hosts are numbered 0 to 1"),
        ({"address": "a", "count": 2, "index": 0}, "--coordinator_address=a: not NAME:PORT"),
    ],
)
def test_half_a_place_is_refused(given, line):
    with pytest.raises(UserError, match=line):
        find_place(**given, environment={})
    with pytest.raises(UserError, match="JAX_PROCESS_ID=x: not a number"):
        find_place(environment={"JAX_PROCESS_ID": "x"})


def test_slurm_tells_a_task_its_place_and_its_gpu():
    assert find_place(environment=TASK) == Place("gpu007:62344", 16, 6, (2,))
    assert find_place(environment=TASK | {"SLURM_STEP_ID": "1"}).address == "gpu007:62345"
    for nodes, first in (("gpu007", "gpu007"), ("gpu007,gpu009", "gpu007"), ("a[3,5-6],b2", "a3"), ("b2,a[3,5]", "b2")):
        assert find_place(environment=TASK | {"SLURM_STEP_NODELIST": nodes}).address == f"{first}:62344"


def test_a_task_takes_all_the_gpus_that_are_its_own():
    assert find_place(environment=TASK | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}).local_devices is None
    assert find_place(environment=TASK | {"CUDA_VISIBLE_DEVICES": "2"}).local_devices is None


def test_a_slurm_job_whose_script_forgot_srun_is_told():
    script = {name: TASK[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")}
    with pytest.raises(UserError, match="SLURM gives this job 16 tasks, and this process is none of them"):
        find_place(environment=script)
    assert find_place(environment=script | {"SLURM_NTASKS": "1"}) is None
    assert find_place(environment=TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_tpu_pods_tell_through_jax(monkeypatch):
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost,b,c,d"),
        ("TPU_WORKER_ID", "1"),
    ):
        monkeypatch.setenv(name, value)
    for name, value in (("NUM_SLICES", "2"), ("SLICE_ID", "1"), ("COORDINATOR_ADDRESS", "localhost:8080")):
        monkeypatch.setenv(f"MEGASCALE_{name}", value)
    assert find_place(environment={}) == Place("localhost:8482", 8, 5, None)


def test_a_cluster_that_cannot_tell_gives_a_line(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no pod")

    monkeypatch.setattr("lightning_jax.hosts.place.ClusterEnv.auto_detect_unset_distributed_params", fail)
    with pytest.raises(UserError, match="the other hosts are not to be found: no pod; --num_processes=1 for a single"):
        find_place(environment={})
