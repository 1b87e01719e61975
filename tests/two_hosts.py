"""A command run as two hosts, two virtual devices each."""

import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import tiny_run

from lightning_jax.launch import host_environment, reserved_port


class Said(NamedTuple):
    output: str
    error: str


def on_two_hosts(command: Sequence[str], *, second: Sequence[str] = (), code: int = 0) -> list[Said]:
    """What each host says; both end with `code`.

    Args:
        second: more arguments, for the second host alone.
    """
    with reserved_port() as port:
        both = [
            subprocess.Popen(
                [*command, *(second if index else ())],
                env=host_environment(index, 2, port, devices=2) | {"PYTHONPATH": str(tiny_run.REPOSITORY)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        try:
            said = [Said(*process.communicate(timeout=300)) for process in both]
        finally:
            for process in both:
                process.kill()
    assert [process.returncode for process in both] == [code] * 2, said
    return said
