"""Compiles for a TPU generation on a machine without one; needs the package libtpu.

Shows that a kernel lowers and fits in VMEM, and, by the compiler's dumps, what was scheduled. It cannot run anything.
"""

import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.tpu.block_sizes import Generation

# The smallest topologies that libtpu knows.
TOPOLOGIES: dict[Generation, str] = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:1x1",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:1x1",
    "tpu7x": "tpu7x:1x1x1",
}


def compile_for(generation: Generation, function: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    """`function`, which is jitted, compiled for one device of the generation; arguments: trees of shapes and dtypes.

    libtpu is loaded on the first call; by default it would look for the metadata server of a TPU host, and lock the
    chip that is not there.

    Raises:
      RuntimeError: libtpu is not installed, or the program does not fit in VMEM.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    device = topologies.get_topology_desc(TOPOLOGIES[generation], platform="tpu").devices[0]
    on_device = SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), arguments)
    return function.lower(*arguments).compile()


def vmem_of_kernels(compiled: jax.stages.Compiled) -> list[int]:
    """Bytes of VMEM that each kernel of a compiled program takes, in the program's order."""
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    used = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"')
    return [int(used.search(call)[1]) for call in calls]
