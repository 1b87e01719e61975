"""The sandbox of the tests, or why there is none here."""

import functools

import pytest

from lightning_jax.errors import UserError
from lightning_jax.rewards import Limits, Sandbox

LIMITS = Limits(cpu_seconds=1, wall_seconds=20, processes=4)


@functools.cache
def isolated(workers: int = 2) -> Sandbox:
    try:
        return Sandbox(workers, LIMITS)
    except UserError as error:
        pytest.skip(str(error))
