"""Compiles the kernels for a GPU on a machine without one, and reads what the compiler says they need.

Needs jax-cuda13-plugin and jax-cuda13-pjrt in jax's version, without their CUDA libraries, and the program ptxas (of a
CUDA toolkit, or the package nvidia-cuda-nvcc). It cannot run anything.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

PLUGIN = "jax_cuda13_plugin"
# What XLA wants to know of a GPU.
TARGETS = {
    "h200": """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 62914560
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
""",
}


class KernelResources(NamedTuple):
    """What one kernel needs, as ptxas reports it."""

    name: str
    registers: int  # of a thread when the kernel is launched; warpgroups may trade them afterwards
    spill_stores: int  # bytes per thread
    spill_loads: int
    shared_memory: int  # bytes of a thread block, barriers apart


def resources(function: Callable[..., Any], *arguments: Any, target: str = "h200") -> list[KernelResources]:
    """Of each Mosaic GPU kernel in `function` of these arguments (trees of shapes and dtypes), in the compiler's order.

    Raises:
      RuntimeError: the plugin is not installed, or a kernel does not compile.
    """
    if importlib.util.find_spec(PLUGIN) is None:
        raise RuntimeError(
            f"compiling for a GPU needs {PLUGIN}: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt"
        )
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGETS[target], topology="1x1x1")
    on_device = SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), arguments)
    with tempfile.TemporaryDirectory() as folder:
        with _dumps_in(folder):
            jax.jit(function).lower(*arguments).compile()
        return [_read(report) for report in sorted(pathlib.Path(folder).glob("*.ptxas"))]


@contextlib.contextmanager
def _dumps_in(folder: str) -> Iterator[None]:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    try:
        yield
    finally:
        del os.environ["MOSAIC_GPU_DUMP_TO"]


def _read(report: pathlib.Path) -> KernelResources:
    text = report.read_text()
    [name] = re.findall(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'", text)
    [(stores, loads)] = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    [registers] = re.findall(r"Used (\d+) registers", text)
    [shared_memory] = re.findall(r"smem_scratch_bytes=(\d+)", report.with_suffix(".resources.txt").read_text())
    return KernelResources(name, int(registers), int(stores), int(loads), int(shared_memory))
