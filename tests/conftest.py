"""Eight virtual CPU devices, threads enough for their collectives, and the persistent compilation cache for every test.

All is set before jax is imported, and subprocesses inherit it.
"""

import gc
import os
import pathlib
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# XLA's CPU backend runs independent collectives of a program in any order, and each blocks a thread until the other
# devices have come. With a thread per device, all can wait for one another; 32 leave some for the rest.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "lightning_jax" / "test_compilation")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_go_with_their_file() -> Iterator[None]:
    """Each compiled program holds pieces of memory mapped, of which Linux gives a process 65,530 and no more."""
    yield
    jax.clear_caches()
    gc.collect()
