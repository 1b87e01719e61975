"""The train step of a run compiled for devices that are not here: the compiler's own word on memory.

TPU slices need the package libtpu, whose compiler needs no TPU, and Hopper GPUs JAX's CUDA plugin; any mesh can be
compiled for as many virtual devices of the CPU, whose buffers are laid out alike but whose fusion is its own. Kernels
are compiled for their devices only where JAX runs on such; here it is their counterparts in XLA.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from lightning_jax import parallel
from lightning_jax.config import RunConfig
from lightning_jax.errors import UserError
from lightning_jax.planning.collectives import sent_by_axes
from lightning_jax.planning.hardware import Slice
from lightning_jax.programs import Programs
from lightning_jax.stages import Stage
from pallas_kernels.gpu.deviceless import INSTALL_PLUGIN, PLUGIN, TARGETS

HOPPER = ("h800", "h100", "h200")  # equal but for memory and links; described as the H200

BATCH_DTYPES = {
    "inputs": "int32",
    "targets": "int32",
    "segment_ids": "int32",
    "positions": "int32",
    "loss_mask": "bool",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device; bytes and seconds."""

    arguments: int  # weights, moments and the batch; donated, so that the results take no more
    temporaries: int  # gradients, activations and whatever else lives within the step
    on_host: int  # moments and activations that wait in the host's memory
    compile_seconds: float
    sent: dict[tuple[str, ...], float] | None  # bytes by mesh axes; None where the compiler does not show its program

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def lower(config: RunConfig, stage: Stage, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """The stage's train step at its largest batch."""
    programs = Programs(config, [stage], devices)
    rows = stage.most_rows
    on_mesh = parallel.batch_sharding(programs.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((rows, stage.config.context_length), dtype, sharding=on_mesh)
        for name, dtype in BATCH_DTYPES.items()
    }
    return programs.train_step(stage, rows).lower(programs.abstract_state, batch, *programs.abstract_frozen)


def compile_step(config: RunConfig, stage: Stage, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles for the devices, which may be described only.

    Raises:
        UserError: the step does not fit the devices' memory; the message is the compiler's.
    """
    if stage.config.objective != "next_token":
        raise UserError(
            f"--compile: stage {stage.name} is {stage.config.objective}; only next_token is compiled so far"
        )
    start = time.perf_counter()
    try:
        program = lower(config, stage, devices).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the compiler says: {str(error).splitlines()[0]}") from error
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        seconds,
        _sent(program, config.resolved_mesh(len(devices))),
    )


def _sent(program: jax.stages.Compiled, mesh: dict[str, int]) -> dict[tuple[str, ...], float] | None:
    try:
        return sent_by_axes(program.as_text(), mesh)
    except jax.errors.JaxRuntimeError:  # of a TPU executable that is only described
        return None


def described_devices(target: Slice) -> Sequence[jax.Device]:
    """The devices of a slice, without having them.

    Raises:
        UserError: no compiler for them is installed here.
    """
    if target.chip.platform == "cpu":
        try:
            jax.config.update("jax_num_cpu_devices", target.num_devices)
        except RuntimeError as error:  # JAX has looked for its devices, to choose a size
            raise UserError(f"--devices={target.name}: name the size: --config=FILE.py:SIZE") from error
        return jax.devices("cpu")
    if target.chip.platform == "gpu":
        return _described_gpus(target)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--compile: for {target.chip.name} it needs: pip install libtpu; leave --compile away, or use cpu:N"
        )
    try:
        return topologies.get_topology_desc(target.topology, platform="tpu", num_slices=target.num_slices).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--compile: libtpu has no {target.name}, {str(error).splitlines()[0]}; give one of the shapes in "
            f"docs.cloud.google.com/tpu/docs/{target.chip.name}"
        ) from error


def _described_gpus(target: Slice) -> Sequence[jax.Device]:
    chip = target.chip
    if chip.name not in HOPPER:
        raise UserError(
            f"--compile: the compiler has no description of {chip.name}; leave --compile away, or use cpu:N"
        )
    if importlib.util.find_spec(PLUGIN) is None:
        raise UserError(f"--compile: for {chip.name} it needs: {INSTALL_PLUGIN}; leave --compile away, or use cpu:N")
    described = re.sub(r"device_memory_size: \d+", f"device_memory_size: {chip.memory_bytes:.0f}", TARGETS["h200"])
    in_a_node = math.gcd(chip.linked, target.num_chips)
    nodes = f"1x{target.num_chips // in_a_node}x{in_a_node}"
    return topologies.get_topology_desc(platform="cuda", target_config=described, topology=nodes).devices
