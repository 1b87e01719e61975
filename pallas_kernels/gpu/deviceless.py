"""Compiles the kernels for a GPU on a machine without one, and reads what the compiler says they need.

Needs jax-cuda13-plugin and jax-cuda13-pjrt in jax's version, without their CUDA libraries, and the program ptxas, of a
CUDA toolkit or of the package nvidia-cuda-nvcc. It cannot run anything.
"""

import collections
import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

PLUGIN = "jax_cuda13_plugin"
INSTALL_PLUGIN = "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt"
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


# What was reported so far, by name: a process compiles a kernel once.
_compiled: dict[str, list[KernelResources]] = {}


def resources(function: Callable[..., Any], *arguments: Any, target: str = "h200") -> list[KernelResources]:
    """Of each Mosaic GPU kernel in `function` of these arguments (trees of shapes and dtypes), by name.

    A kernel that occurs twice is listed once. One that this process compiled before is listed as it was then.

    Raises:
      RuntimeError: something is not installed (see `missing`), or a kernel does not compile.
    """
    if missing():
        raise RuntimeError(f"compiling for a GPU needs {missing()}")
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGETS[target], topology="1x1x1")
    on_device = SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), arguments)
    with tempfile.TemporaryDirectory() as folder:
        with _dumps_in(folder):
            # A function that JAX has not seen before, since what it has in its caches would not be dumped.
            jax.jit(lambda *x: function(*x)).lower(*arguments).compile()
        reports, estimates = _dumps(folder, ".ptxas"), _dumps(folder, ".resources.txt")
    for name in reports:
        # JAX and its compiler number kernels of one name in orders of their own; those of one call share an estimate.
        pairs = zip(reports[name], estimates[name], strict=False)
        _compiled[name] = sorted({_read(name, *pair) for pair in pairs})
    return [kernel for name in sorted(estimates) for kernel in _compiled[name]]


def missing() -> str | None:
    """What this machine lacks to compile for a GPU, and how to install it; None if it lacks nothing."""
    if importlib.util.find_spec(PLUGIN) is None:
        return f"{PLUGIN}: {INSTALL_PLUGIN}"
    nvidia = importlib.util.find_spec("nvidia")
    packages = [f"{folder}/cu13/bin" for folder in nvidia.submodule_search_locations] if nvidia else []
    if shutil.which("ptxas", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", *packages])) is None:
        return "ptxas: pip install nvidia-cuda-nvcc"
    return None


@contextlib.contextmanager
def _dumps_in(folder: str) -> Iterator[None]:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    try:
        yield
    finally:
        del os.environ["MOSAIC_GPU_DUMP_TO"]


def _dumps(folder: str, suffix: str) -> dict[str, list[str]]:
    """The texts of files called KERNEL_NUMBER.suffix, by kernel and in the order of their numbers."""

    def parts(path):
        name, _, number = path.name.removesuffix(suffix).rpartition("_")
        return name, int(number)

    texts = collections.defaultdict(list)
    for path in sorted(pathlib.Path(folder).glob("*" + suffix), key=parts):
        texts[parts(path)[0]].append(path.read_text())
    return texts


def _read(name: str, report: str, estimate: str) -> KernelResources:
    [(stores, loads)] = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    [registers] = re.findall(r"Used (\d+) registers", report)
    [shared_memory] = re.findall(r"smem_scratch_bytes=(\d+)", estimate)
    return KernelResources(name, int(registers), int(stores), int(loads), int(shared_memory))
