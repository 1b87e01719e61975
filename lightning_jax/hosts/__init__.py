"""A run on many hosts: finding one another, agreeing on what to run, and noticing who fails or hangs.

A host is a process of the run, as a rule one on each machine. `join` finds the others and returns `Hosts`, through
which this one compares itself with them, tells what it does, and ends with them.

Where a host is missing or gone, JAX's coordination service ends the others without a word on which it was. So hosts
have a line of their own: a connection of each to host 0, from before `jax.distributed` starts until the process ends.
"""

from lightning_jax.hosts.agreement import run_facts
from lightning_jax.hosts.ending import MISTAKE, RESTART, STOPPED, HostsError
from lightning_jax.hosts.hosts import Hosts
from lightning_jax.hosts.joining import add_arguments, join, options_in_common
from lightning_jax.hosts.shared_folder import check_shared
from lightning_jax.hosts.watchdog import watch

__all__ = [
    "MISTAKE",
    "RESTART",
    "STOPPED",
    "Hosts",
    "HostsError",
    "add_arguments",
    "check_shared",
    "join",
    "options_in_common",
    "run_facts",
    "watch",
]
