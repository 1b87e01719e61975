"""What the devices of a run compute: its first state, and the steps of each stage."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lightning_jax import parallel
from lightning_jax.config import RunConfig
from lightning_jax.generation.exact import drawn_tokens
from lightning_jax.input_pipeline import Batch as HostBatch
from lightning_jax.models import HybridLM, RewardModel, lora
from lightning_jax.objectives import NextToken, PolicyGradient, Preference, Reward
from lightning_jax.objectives.policy_gradient import sequence_log_probs
from lightning_jax.objectives.preference import segment_log_probs
from lightning_jax.optimizers import build_optimizer, learning_rate
from lightning_jax.stages import Stage, num_micro_batches
from lightning_jax.train_step import (
    Batch,
    Objective,
    TrainState,
    make_evaluation_step,
    make_train_step,
    mapped_rows,
    with_value_step,
)
from lightning_jax.value_programs import ValuePrograms


class Programs:
    """The programs of a run on a mesh.

    Args:
      stages: of the run; the first one's optimizer makes the state that serves all.
      devices: to lay the run out on, if not all there are; described ones will do to compile for.

    Attributes:
      kind: of model.
      value: the programs of the value model, where a stage has one.
      mesh: the devices that train.
      shards: into how many parts they split the rows of a batch.
      host: which part of a batch's rows this host reads.
      abstract_state: shapes, dtypes and shardings of the train state.
      abstract_frozen: of what steps take besides, where adapters are trained: the weights that they belong to.
      frozen: these weights, once somebody has put them here.
    """

    def __init__(self, config: RunConfig, stages: list[Stage], devices: Sequence[jax.Device] | None = None):
        self._config = config
        devices = jax.devices() if devices is None else devices
        num_training = len(devices) - config.num_rollout_devices
        self.mesh = parallel.make_mesh(config.mesh, devices[:num_training])
        share = config.rollout_mesh and parallel.make_mesh(config.rollout_mesh, devices[num_training:])
        self._rollout_mesh = share or parallel.without_sequence(self.mesh)
        self.shards = parallel.batch_shards(self.mesh)
        self._rows = parallel.batch_sharding(self.mesh)
        self.host = parallel.rows_of_host(self.mesh, jax.process_index())
        self._moments_on_host = config.mesh.moments == "host"
        operators = parallel.operators(
            self.mesh, config.model, config.mesh.sequence_attention, config.mesh.gradient_dtype
        )
        self.kind = RewardModel if stages[0].config.objective == "reward_model" else HybridLM

        def make_model(rngs: nnx.Rngs) -> HybridLM | RewardModel:
            model = self.kind(config.model, rngs=rngs, operators=operators)
            if config.lora:
                lora.adapt(model, config.lora, rngs=rngs)
            return model

        self.graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))), nnx.Param)
        self.abstract_frozen = (parallel.abstract(lora.split(abstract)[1], self.mesh),) if config.lora else ()
        self.frozen: tuple[nnx.State, ...] = ()
        optimizer = self.optimizer(stages[0])

        with_value = next((stage for stage in stages if stage.config.value), None)
        self.value = ValuePrograms(config, with_value, self.mesh, self._rows) if with_value else None

        def create() -> TrainState:
            params = nnx.state(make_model(nnx.Rngs(params=config.seed)), nnx.Param)
            if config.lora:
                params, _ = lora.split(params)
            value = self.value.create() if self.value else None
            return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0), value)

        self._create = create
        shapes = jax.eval_shape(create)
        self._shardings = parallel.shardings(shapes, self.mesh)
        if self._moments_on_host:
            self._shardings = self._with_moments_on_host(self._shardings, shapes)
        self.abstract_state = jax.tree.map(
            lambda shape, sharding: shape.update(sharding=sharding), shapes, self._shardings
        )

    def first_state(self) -> TrainState:
        """The state before the first step, each device holding its part."""
        return jax.jit(self._create, out_shardings=self._shardings)()

    def first_value(self) -> TrainState:
        """The state of the value model that a run with one begins with."""
        return jax.jit(self.value.create, out_shardings=self._shardings.value)()

    def weights(self, params: nnx.State) -> nnx.State:
        """All of the model's: what is trained, and what is frozen."""
        return nnx.merge_state(params, *self.frozen)

    def merged(self, params: nnx.State) -> nnx.State:
        """The weights of the model without adapters that computes the same."""
        adapters = self._config.lora
        return jax.jit(lora.merged, static_argnums=1)(self.weights(params), adapters) if adapters else params

    def train_step(self, stage: Stage, rows: int) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
        """(state, batch, *frozen) -> (state, metrics) for batches of so many rows; the state given to it is used up."""
        place = {
            "first_step": stage.first_step,
            "num_micro_batches": num_micro_batches(stage.config, rows, self.shards),
        }
        optimizer, rate = self.optimizer(stage), self._learning_rate(stage)
        value = stage.config.value
        trains_from = stage.first_step + (value.warmup_steps if value else 0)
        step = make_train_step(self.graphdef, self.objective(stage), optimizer, rate, trains_from=trains_from, **place)
        if value:
            step = with_value_step(step, self.value.train_step(stage, **place))
        return jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, None))

    def evaluation_step(self, stage: Stage) -> Callable[[nnx.State, Batch], Any]:
        """(weights, batch) -> sums of the stage's objective."""
        return jax.jit(make_evaluation_step(self.graphdef, self.objective(stage)))

    def log_prob_step(self, stage: Stage) -> Callable[[nnx.State, Batch], jax.Array]:
        """(weights, batch) -> the log-probability [B, T] of each segment."""

        def log_probs(weights: nnx.State, batch: Batch) -> jax.Array:
            model = nnx.merge(self.graphdef, weights)
            parts = num_micro_batches(stage.config, len(batch["inputs"]), self.shards)

            def part(micro_batch: Batch) -> jax.Array:
                return segment_log_probs(model, self._config.model, micro_batch, stage.config.rope_theta)[0]

            return mapped_rows(part, batch, parts)

        return jax.jit(log_probs, out_shardings=self._rows)

    def policy_log_prob_step(self, stage: Stage) -> Callable[[nnx.State, Batch], jax.Array]:
        """(weights, batch) -> the log-probability [B, T] of each target at the temperature of the stage's rollouts."""
        given = {"temperature": stage.config.reinforcement.rollouts.temperature, "rope_theta": stage.config.rope_theta}

        def log_probs(weights: nnx.State, batch: Batch) -> jax.Array:
            return sequence_log_probs(nnx.merge(self.graphdef, weights), self._config.model, batch, **given)[0]

        return jax.jit(log_probs, out_shardings=self._rows)

    def draw_step(self, stage: Stage) -> Callable[[nnx.State, Batch], tuple[jax.Array, jax.Array]]:
        """(weights, batch) -> at every place the token [B, T] that the training forward draws, its log-probability."""
        given = {"temperature": stage.config.reinforcement.rollouts.temperature, "rope_theta": stage.config.rope_theta}

        def draws(weights: nnx.State, batch: Batch) -> tuple[jax.Array, jax.Array]:
            return drawn_tokens(nnx.merge(self.graphdef, weights), self._config.model, batch, **given)

        return jax.jit(draws, out_shardings=self._rows)

    def by_rows(
        self, stage: Stage, step: Callable[[nnx.State, Batch], Any], weights: nnx.State, rows: HostBatch
    ) -> Any:
        """`step(weights, batch)` of any number of rows [N, T], some at a time; every process has rows and results."""
        count, num_rows = self.evaluation_rows(stage), len(rows["inputs"])
        share = count // self.host.count
        results = []
        for first in range(0, num_rows, count):
            # Rows are taken again to fill the last batch: every batch is one shape.
            taken = np.resize(np.arange(first, min(first + count, num_rows)), count)
            own = taken[self.host.index * share : (self.host.index + 1) * share]
            batch = self.on_devices({name: array[own] for name, array in rows.items()})
            results.append(multihost_utils.process_allgather(step(weights, batch), tiled=True))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_rows], *results)

    def to_generate(self, params: nnx.State) -> tuple[Mesh, nnx.State]:
        """The mesh that makes completions, and the weights on it: a copy where its devices do not train."""
        weights = self.merged(params)
        return self._rollout_mesh, jax.device_put(weights, parallel.shardings(weights, self._rollout_mesh))

    def evaluation_rows(self, stage: Stage) -> int:
        """Rows of a batch that needs no micro-batches."""
        rows = stage.batch_sizes.rows(0)
        return rows // num_micro_batches(stage.config, rows, self.shards)

    def objective(self, stage: Stage) -> Objective:
        """What the stage minimises."""
        settings, model = stage.config, self._config.model
        match settings.objective:
            case "preference":
                return Preference(model, settings.preference, settings.rope_theta)
            case "reward_model":
                return Reward(model, settings.reward_model, settings.rope_theta)
            case "policy_gradient":
                learning = settings.reinforcement
                temperature = learning.rollouts.temperature
                return PolicyGradient(model, learning.policy_gradient, temperature, settings.rope_theta)
        return NextToken(model, settings.rope_theta, settings.reduction)

    def optimizer(self, stage: Stage) -> Any:
        return build_optimizer(
            stage.config.optimizer, self._learning_rate(stage), moments_on_host=self._moments_on_host
        )

    def on_devices(self, batch: HostBatch) -> Batch:
        """The global batch of which this is the host's part."""
        count = self.host.count
        return {
            name: jax.make_array_from_process_local_data(self._rows, array, (count * len(array), *array.shape[1:]))
            for name, array in batch.items()
        }

    def _learning_rate(self, stage: Stage) -> Callable[[jax.Array], jax.Array]:
        return learning_rate(stage.config.schedule, stage.batch_sizes.num_steps)

    def _with_moments_on_host(self, shardings: TrainState, shapes: TrainState) -> TrainState:
        on_host = parallel.on_host(shardings.opt_state, shapes.opt_state, self.mesh)
        value = shardings.value and self._with_moments_on_host(shardings.value, shapes.value)
        return shardings._replace(opt_state=on_host, value=value)
