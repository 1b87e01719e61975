"""The train step of a run compiled for devices that are not here: the compiler's own word on memory.

TPU slices need the package libtpu, whose compiler needs no TPU; any mesh can be compiled for as many virtual devices of
the CPU, whose buffers are laid out alike but whose fusion is its own.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from lightning_jax import parallel
from lightning_jax.config import RunConfig
from lightning_jax.errors import UserError
from lightning_jax.planning.hardware import Slice
from lightning_jax.programs import Programs
from lightning_jax.stages import Stage

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
    compile_seconds: float

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
        memory = lower(config, stage, devices).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the compiler says: {str(error).splitlines()[0]}") from error
    seconds = time.perf_counter() - start
    return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, seconds)


def described_devices(target: Slice) -> Sequence[jax.Device]:
    """The devices of a slice, without having them.

    Raises:
        UserError: no compiler for them is installed here.
    """
    if target.chip.platform == "cpu":
        try:
            jax.config.update("jax_num_cpu_devices", target.num_devices)
        except RuntimeError as error:  # JAX has looked for its devices, to choose a size
            raise UserError(f"--devices={target.topology}: name the size: --config=FILE.py:SIZE") from error
        return jax.devices("cpu")
    if target.chip.platform != "tpu":
        raise UserError(
            f"--compile: there is no compiler here for {target.chip.name}; leave --compile away, or use cpu:N"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    try:
        return topologies.get_topology_desc(target.topology, platform="tpu").devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--compile: {str(error).splitlines()[0]}; it needs: pip install libtpu") from error
