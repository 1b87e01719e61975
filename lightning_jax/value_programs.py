"""What the devices of a run compute of a value model, beside the policy that it serves: its own state and steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lightning_jax import parallel
from lightning_jax.config import RunConfig
from lightning_jax.models import RewardModel
from lightning_jax.objectives import Value
from lightning_jax.objectives.forward import training_forward
from lightning_jax.optimizers import build_optimizer, learning_rate
from lightning_jax.stages import Stage
from lightning_jax.train_step import Batch, TrainState, TrainStep, make_train_step


class ValuePrograms:
    """The programs of a value model.

    Args:
      first: the first stage that has one; its state serves all that do.
      rows: how a batch's rows lie on the devices.

    Attributes:
      model: its size.
    """

    def __init__(self, config: RunConfig, first: Stage, mesh: Mesh, rows: NamedSharding):
        self.model = first.config.value.model or config.model
        self._seed, self._first, self._rows = config.seed, first, rows
        self._moments_on_host = config.mesh.moments == "host"
        self._operators = parallel.operators(
            mesh, self.model, config.mesh.sequence_attention, config.mesh.gradient_dtype
        )
        self._graphdef = nnx.graphdef(nnx.eval_shape(lambda: self._make(nnx.Rngs(0))))

    def create(self) -> TrainState:
        """The state before the first step, whose weights a stage replaces as it begins."""
        params = nnx.state(self._make(nnx.Rngs(params=self._seed + 1)), nnx.Param)
        return TrainState(jnp.int32(0), params, self._optimizer(self._first).init(params), jnp.int32(0))

    def train_step(self, stage: Stage, **place: int) -> TrainStep:
        """Of a stage; `place` is what `make_train_step` wants to know."""
        value = stage.config.value
        objective = Value(self.model, value.clip, value.coefficient, stage.config.rope_theta)
        return make_train_step(self._graphdef, objective, self._optimizer(stage), self._learning_rate(stage), **place)

    def step(self, stage: Stage) -> Callable[[nnx.State, Batch], jax.Array]:
        """(weights, batch) -> the value [B, T] of what stands up to each input."""

        def values(weights: nnx.State, batch: Batch) -> jax.Array:
            return training_forward(nnx.merge(self._graphdef, weights), batch, stage.config.rope_theta)[0]

        return jax.jit(values, out_shardings=self._rows)

    def _make(self, rngs: nnx.Rngs) -> RewardModel:
        return RewardModel(self.model, rngs=rngs, operators=self._operators)

    def _optimizer(self, stage: Stage) -> Any:
        optimizer, rate = stage.config.value.optimizer, self._learning_rate(stage)
        return build_optimizer(optimizer, rate, moments_on_host=self._moments_on_host)

    def _learning_rate(self, stage: Stage) -> Callable[[jax.Array], jax.Array]:
        return learning_rate(stage.config.value.schedule, stage.batch_sizes.num_steps)
