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
from types import FrameType

from lightning_jax.command_line import USAGE_ERROR
from lightning_jax.hosts import RESTART

ENDED = (0, 1, USAGE_ERROR, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes after which nobody starts it again
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
        [sys.executable, "-u", "-m", "lightning_jax.train", *arguments],
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
    with reserved_port() as port:
        processes = [_start(index, hosts, port, devices, arguments) for index in range(hosts)]
        try:
            readers = [threading.Thread(target=_show, args=(index, each)) for index, each in enumerate(processes)]
            for reader in readers:
                reader.start()
            _wait(processes)
            for reader in readers:
                reader.join()
        finally:
            for process in processes:
                process.kill()
    codes = [process.wait() for process in processes]
    return next((code for code in codes if code > 0), RESTART if any(codes) else 0)


def _wait(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Returns when all have ended, by themselves or after Ctrl-C; or a while after the first that failed."""
    stopping = False
    failed_at: float | None = None
    while any(process.poll() is None for process in processes):
        try:
            time.sleep(0.1)
        except KeyboardInterrupt:
            if stopping:
                return
            stopping = True
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code of the run."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_jax.launch", description="Trains on several hosts that are processes of this machine."
    )
    parser.add_argument("--hosts", type=int, default=2, help="processes; 2")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of each; 1")
    parser.add_argument("--restarts", type=int, default=0, help="how often to start again when hosts fail; 0")
    options, rest = parser.parse_known_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    for restarts_left in range(options.restarts, -1, -1):
        code = run_hosts(options.hosts, options.devices, rest)
        if code in ENDED or not restarts_left:
            return code
        print(f"launch: exit code {code}; all hosts are started again, {restarts_left} times at most", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
