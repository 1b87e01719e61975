"""Finding the other hosts of a run, before JAX does."""

import argparse
import socket
from typing import Any

import jax

from lightning_jax.errors import UserError
from lightning_jax.hosts.ending import HostsError
from lightning_jax.hosts.hosts import Hosts
from lightning_jax.hosts.hub import Hub
from lightning_jax.hosts.line import Line
from lightning_jax.hosts.place import find_place

JOINING = ("coordinator_address", "num_processes", "process_id", "join_timeout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `join`."""
    group = parser.add_argument_group("many hosts", "TPU pods, SLURM and Kubernetes need none of these.")
    add = group.add_argument
    add("--coordinator_address", metavar="NAME:PORT", help="where host 0 is reached; or JAX_COORDINATOR_ADDRESS")
    add("--num_processes", metavar="N", type=int, help="hosts of the run; or JAX_NUM_PROCESSES")
    add("--process_id", metavar="I", type=int, help="which of them this is, from 0; or JAX_PROCESS_ID")
    add("--join_timeout", metavar="SECONDS", type=int, default=300, help="for all hosts to come; 300")


def options_in_common(options: argparse.Namespace) -> dict[str, Any]:
    """The options in which hosts may not differ, by name: all but those of `join`."""
    return {name: value for name, value in vars(options).items() if name not in JOINING}


def join(options: argparse.Namespace) -> Hosts:
    """Waits for the other hosts of the run, if there are any, and makes their devices one. Before any use of devices.

    Raises:
      HostsError: a host did not come in time; the message names it.
      UserError: this process cannot tell which host it is, or hosts contradict each other.
    """
    timeout = options.join_timeout
    place = find_place(options.coordinator_address, options.num_processes, options.process_id, timeout=timeout)
    if place is None:
        return Hosts()
    hub = Hub(int(place.address.rpartition(":")[2]), place.count, timeout) if place.index == 0 else None
    try:
        line = Line(place, socket.gethostname(), timeout)
    except (HostsError, UserError):
        if hub:
            hub.wait_for_others()
        raise
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
    )
    return Hosts(place.index, line, hub)
