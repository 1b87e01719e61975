"""The train step of a run compiled for devices that are not here: the compiler's own word on memory.

TPU slices need the package libtpu, whose compiler needs no TPU; any mesh can be compiled for as many virtual devices of
the CPU, whose buffers are laid out alike but whose fusion is its own.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from lightning_jax import parallel
from lightning_jax.config import RunConfig
from lightning_jax.errors import UserError
from lightning_jax.models import HybridLM
from lightning_jax.objectives import NextToken
from lightning_jax.optimizers import build_optimizer, learning_rate
from lightning_jax.planning.hardware import Slice
from lightning_jax.stages import Stage, num_micro_batches
from lightning_jax.train_step import TrainState, make_train_step

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


def abstract_state(config: RunConfig, stage: Stage, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of everything that a step reads and writes."""
    optimizer = _optimizer(stage)

    def create() -> TrainState:
        params = nnx.state(HybridLM(config.model, rngs=nnx.Rngs(params=0)), nnx.Param)
        return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))

    shapes = jax.eval_shape(create)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        parallel.shardings(shapes, mesh),
    )


def lower(config: RunConfig, stage: Stage, mesh: Mesh) -> jax.stages.Lowered:
    """The stage's train step at its largest batch."""
    rows = stage.batch_sizes.rows(stage.batch_sizes.num_steps - 1)
    operators = parallel.operators(mesh, config.model, config.mesh.sequence_attention)
    model = nnx.eval_shape(lambda: HybridLM(config.model, rngs=nnx.Rngs(0), operators=operators))
    step = make_train_step(
        nnx.graphdef(model),
        NextToken(config.model, stage.config.rope_theta),
        _optimizer(stage),
        learning_rate(stage.config.schedule, stage.batch_sizes.num_steps),
        first_step=stage.first_step,
        num_micro_batches=num_micro_batches(stage.config, rows, parallel.batch_shards(mesh)),
    )
    state = abstract_state(config, stage, mesh)
    on_mesh = parallel.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((rows, stage.config.context_length), dtype, sharding=on_mesh)
        for name, dtype in BATCH_DTYPES.items()
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, batch)


def compile_step(config: RunConfig, stage: Stage, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles for the devices, which may be described only.

    Raises:
        UserError: the step does not fit the devices' memory; the message is the compiler's.
    """
    mesh = parallel.make_mesh(config.mesh, devices)
    start = time.perf_counter()
    try:
        memory = lower(config, stage, mesh).compile().memory_analysis()
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
        jax.config.update("jax_num_cpu_devices", target.num_chips)
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


def _optimizer(stage: Stage):
    rate = learning_rate(stage.config.schedule, stage.batch_sizes.num_steps)
    return build_optimizer(stage.config.optimizer, rate)
