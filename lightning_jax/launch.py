"""Tries a run on many hosts on one machine: every host is a process with virtual CPU devices of its own.

    python -m lightning_jax.launch --hosts=2 --devices=4 --config=configs/minimax_m1.py --config.mesh.fsdp=8

Whatever is not an option of the launcher is an argument of `lightning_jax.train`. Each line of output begins with the
number of its host. Ctrl-C stops all hosts after the same step, saved; a second one at once. With --restarts they are
started again as a scheduler would: after every exit code but 0, 1 and 2, and those of a stop that was asked for.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from lightning_jax.hosts import MISTAKE, RESTART, STOPPED

ENDED = (0, 1, MISTAKE, STOPPED, 128 + signal.SIGTERM)  # exit codes after which nobody starts it again
COMMAND = (sys.executable, "-u", "-m", "lightning_jax.train")
_GRACE_S = 60.0  # in which the others end by themselves when one has failed


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of this machine that nobody else is given as long as the context lasts, for host 0 to listen on."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # bound, but not listening: host 0 may listen
        place.bind(("", 0))
        yield place.getsockname()[1]


def host_environment(index: int, hosts: int, port: int, devices: int) -> dict[str, str]:
    """In which a process is one of the hosts of a run on this machine, with virtual devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(hosts),
        "JAX_PROCESS_ID": str(index),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
    }


def _start(index: int, hosts: int, port: int, devices: int, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """A host as a process that no signal of the terminal reaches."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env=host_environment(index, hosts, port, devices),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def run_hosts(hosts: int, devices: int, arguments: Sequence[str]) -> int:
    """Runs all hosts to their end; returns the exit code of the run."""
    with reserved_port() as port, _noted_stops() as stops:
        processes = [_start(index, hosts, port, devices, arguments) for index in range(hosts)]
        try:
            readers = [threading.Thread(target=_show, args=(index, each)) for index, each in enumerate(processes)]
            for reader in readers:
                reader.start()
            _wait(processes, stops)
        finally:
            for process in processes:
                process.kill()
        for reader in readers:
            reader.join()
    codes = [process.wait() for process in processes]
    killed = STOPPED if stops else RESTART
    return next((code for code in codes if code > 0), killed if any(codes) else 0)


@contextlib.contextmanager
def _noted_stops() -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM do no more than to lengthen the list."""
    stops: list[int] = []
    before = {
        each: signal.signal(each, lambda number, frame: stops.append(number))
        for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stops
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _wait(processes: Sequence[subprocess.Popen[str]], stops: Sequence[int]) -> None:
    """Returns when all have ended, at the second stop, or a while after the first process that failed."""
    told = False
    failed_at: float | None = None
    while any(process.poll() is None for process in processes) and len(stops) < 2:
        time.sleep(0.1)
        if stops and not told:
            told = True
            for process in processes:
                process.terminate()
        if failed_at is None and any(process.returncode for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_S:
            print(f"launch: the other hosts did not end within {_GRACE_S:.0f} s and are killed", file=sys.stderr)
            return


def _show(index: int, process: subprocess.Popen[str]) -> None:
    for line in process.stdout:
        sys.stdout.write(f"{index} | {line}")
        sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code of the run."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_jax.launch", description="Trains on several hosts that are processes of this machine."
    )
    parser.add_argument("--hosts", type=int, default=2, help="processes; 2")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of each; 1")
    parser.add_argument("--restarts", type=int, default=0, help="how often to start again when hosts fail; 0")
    options, rest = parser.parse_known_args(arguments)
    for name, least in (("hosts", 1), ("devices", 1), ("restarts", 0)):
        if (value := getattr(options, name)) < least:
            parser.error(f"--{name}={value}: give {least} or more")
    for restarts_left in range(options.restarts, -1, -1):
        code = run_hosts(options.hosts, options.devices, rest)
        if code in ENDED or not restarts_left:
            return code
        print(f"launch: exit code {code}; all hosts are started again, {restarts_left} times at most", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
