"""Which of a run's hosts this process is: as flags or variables say, or as SLURM, a TPU pod or another cluster tells.

Variables: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as Kubeflow and our own launchers set them.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jax._src.clusters import ClusterEnv  # what jax.distributed asks; it has no public name

from lightning_jax.errors import UserError

# Above those that Linux hands out by itself.
_FIRST_PORT, _NUM_PORTS = 61440, 4096


@dataclass(frozen=True)
class Place:
    """This process among the hosts of a run.

    Attributes:
      address: "name:port" at which host 0 is reached.
      count: hosts of the run, at least 2.
      index: of this one, from 0.
      local_devices: the GPUs that are this host's, by their place among the visible ones; None for all.
    """

    address: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None


class _Found(NamedTuple):
    address: str | None = None
    count: int | None = None
    index: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_place(
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    timeout: int = 300,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """The place of this process; None where the run has no other host.

    Args:
      address, count, index: what the user says; the rest is found out.
      timeout: seconds to wait for the name of host 0, where a cluster makes it known late.

    Raises:
      UserError: some of it is not to be found, or makes no sense.
    """
    address = address or environment.get("JAX_COORDINATOR_ADDRESS")
    count = _number("JAX_NUM_PROCESSES", environment) if count is None else count
    index = _number("JAX_PROCESS_ID", environment) if index is None else index
    if count == 1:
        return None
    given = _Found(address, count, index)
    found = given if None not in given[:3] else _ask_cluster(given, timeout, environment)
    if found.count == 1 or found[:3] == (None, None, None):
        return None
    names = ("--coordinator_address", "--num_processes", "--process_id")
    if missing := [name for name, value in zip(names, found[:3], strict=True) if value is None]:
        raise UserError(f"{', '.join(missing)}: not given, and nothing here tells; --num_processes=1 for a single host")
    if not 0 <= found.index < found.count:
        raise UserError(f"--process_id={found.index}: hosts are numbered 0 to {found.count - 1}")
    if not re.fullmatch(r".+:\d+", found.address):
        raise UserError(f"--coordinator_address={found.address}: not NAME:PORT, at which host 0 is reached")
    return Place(*found)


def _number(variable: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(variable)
    if text is not None and not text.isdecimal():
        raise UserError(f"{variable}={text}: not a number")
    return None if text is None else int(text)


def _ask_cluster(given: _Found, timeout: int, environment: Mapping[str, str]) -> _Found:
    """`given`, with what the scheduler or the machine knows where it says nothing."""
    if "SLURM_JOB_ID" in environment:
        found = _ask_slurm(environment)
        return _Found(*(own if own is not None else other for own, other in zip(given, found, strict=True)))
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(*given, None, timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the other hosts are not to be found: {error}; --num_processes=1 for a single host") from None
    return _Found(*found[:3], None if found[3] is None else tuple(found[3]))


def _ask_slurm(environment: Mapping[str, str]) -> _Found:
    """The place of a task of `srun`. JAX's own answer leaves all GPUs but one unused where a node has one task."""
    if "SLURM_STEP_NODELIST" not in environment:
        tasks = environment.get("SLURM_NTASKS", environment.get("SLURM_JOB_NUM_NODES", "1"))
        if tasks != "1":
            raise UserError(
                f"SLURM gives this job {tasks} tasks, and this process is none of them: start it with srun, or with "
                "--num_processes=1 as a single host"
            )
        return _Found(count=1)
    prefix, _, numbers = environment["SLURM_STEP_NODELIST"].partition(",")[0].partition("[")
    node = prefix + re.split(r"[,\-\]]", numbers)[0]  # of node[007-009,012] the first is node007
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    tasks_here = int(re.split(r"[(,]", environment["SLURM_STEP_TASKS_PER_NODE"])[0])
    shares_gpus = tasks_here > 1 and len(visible) != 1  # with --gpus-per-task each task sees its own alone
    return _Found(
        f"{node}:{_FIRST_PORT + (job + step) % _NUM_PORTS}",
        int(environment["SLURM_STEP_NUM_TASKS"]),
        int(environment["SLURM_PROCID"]),
        (int(environment["SLURM_LOCALID"]),) if shares_gpus else None,
    )
