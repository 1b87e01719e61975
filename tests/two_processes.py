"""A task run by two real processes, four devices each, that are one run to JAX."""

import multiprocessing
import os

import jax

from lightning_jax.launch import reserved_port

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lightning_jax.checkpoints", "flax.nnx", "optax"])


def in_two_processes(task, *arguments) -> None:
    """Calls a function of a module in both; its assertions are this test's."""
    with reserved_port() as port:
        both = [processes.Process(target=_run, args=(port, index, task, arguments)) for index in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(150)
            process.kill()
            process.join()
    assert [process.exitcode for process in both] == [0, 0]


def _run(port: int, index: int, task, arguments) -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    task(*arguments)
    jax.distributed.shutdown()
