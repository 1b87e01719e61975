"""What the compilers say of the kernels on a machine that cannot run them: that they fit, and what bounds them.

For TPUs, VMEM and the model of `tpu_block_sizes.py` (no time: it omits what that file says); needs the package libtpu.
For an H200, registers, spills and shared memory; needs the CUDA plugin of jax and no driver.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import recording
import tpu_block_sizes
from kernel_roofline import Case
from kernel_sides import answers
from sides import Answers

from pallas_kernels import lightning_attention
from pallas_kernels.tpu.block_size_table import BLOCK_SIZES


def compilation_side(threads: int) -> Answers:
    """Answers for a TPU generation, head dim and direction, and for a case on an H200."""
    folder = tempfile.TemporaryDirectory()
    tpu_block_sizes.dump_to(folder.name)
    versions = recording.package_versions("jax", where_installed=("libtpu", "jax-cuda13-plugin"))
    return versions, answers(
        tpu=lambda generation, dim, direction: tpu_kernel(generation, dim, direction, Path(folder.name)),
        gpu=lambda case: gpu_kernels(Case(*case)),
    )


def tpu_kernel(generation: str, dim: int, direction: str, dumps: Path) -> dict[str, Any]:
    """Of the bfloat16 kernel at the table's block size."""
    chunk, *heads = BLOCK_SIZES[generation, dim, "bfloat16"]
    heads = heads[("forward", "backward").index(direction)]
    candidate = tpu_block_sizes.Candidate(generation, dim, "bfloat16", direction, chunk, heads)
    return candidate._asdict() | tpu_block_sizes.measure(candidate, dumps)


def gpu_kernels(case: Case) -> list[dict[str, Any]]:
    """Of every kernel that a call forward and backward runs, in bfloat16 with documents."""
    from pallas_kernels.gpu.deviceless import resources

    B, H, K, T = case[:4]
    x = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16)
    log_decay, ids = jax.ShapeDtypeStruct((H,), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32)

    def forward_and_backward(q, k, v, do, log_decay, ids):
        def attention(q, k, v):
            return lightning_attention(q, k, v, log_decay, segment_ids=ids, implementation="pallas_gpu")

        o, pull_back = jax.vjp(attention, q, k, v)
        return o, *pull_back(do)

    return [kernel._asdict() for kernel in resources(forward_and_backward, x, x, x, x, log_decay, ids)]
