"""What the devices of a run compute: its first state, and the steps of each stage."""

import functools
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
from lightning_jax.input_pipeline import Batch as HostBatch
from lightning_jax.models import HybridLM, RewardModel
from lightning_jax.objectives import NextToken, PolicyGradient, Preference, Reward
from lightning_jax.objectives.policy_gradient import sequence_log_probs
from lightning_jax.objectives.preference import segment_log_probs
from lightning_jax.optimizers import build_optimizer, learning_rate
from lightning_jax.stages import Stage, num_micro_batches
from lightning_jax.train_step import Batch, Objective, TrainState, make_evaluation_step, make_train_step


class Programs:
    """The programs of a run on a mesh.

    Args:
      stages: of the run; the first one's optimizer makes the state that serves all.
      devices: to lay the run out on, if not all there are; described ones will do to compile for.

    Attributes:
      mesh: the devices.
      shards: into how many parts they split the rows of a batch.
      host: which part of a batch's rows this host reads.
      abstract_state: shapes, dtypes and shardings of the train state.
    """

    def __init__(self, config: RunConfig, stages: list[Stage], devices: Sequence[jax.Device] | None = None):
        self._config = config
        self.mesh = parallel.make_mesh(config.mesh, devices)
        self.shards = parallel.batch_shards(self.mesh)
        self._rows = parallel.batch_sharding(self.mesh)
        self.host = parallel.rows_of_host(self.mesh, jax.process_index())
        operators = parallel.operators(self.mesh, config.model, config.mesh.sequence_attention)
        kind = RewardModel if stages[0].config.objective == "reward_model" else HybridLM
        make_model = functools.partial(kind, config.model, operators=operators)
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0))))
        optimizer = self.optimizer(stages[0])

        def create() -> TrainState:
            params = nnx.state(make_model(rngs=nnx.Rngs(params=config.seed)), nnx.Param)
            return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))

        self._create = create
        shapes = jax.eval_shape(create)
        self._shardings = parallel.shardings(shapes, self.mesh)
        self.abstract_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self._shardings,
        )

    def first_state(self) -> TrainState:
        """The state before the first step, each device holding its part."""
        return parallel.create_sharded(self._create, self.mesh)

    def train_step(self, stage: Stage, rows: int) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
        """The step of a stage for batches of so many rows; the state given to it is used up."""
        step = make_train_step(
            self.graphdef,
            self.objective(stage),
            self.optimizer(stage),
            self._learning_rate(stage),
            first_step=stage.first_step,
            num_micro_batches=num_micro_batches(stage.config, rows, self.shards),
        )
        return jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, None))

    def evaluation_step(self, stage: Stage) -> Callable[[nnx.State, Batch], Any]:
        """(params, batch) -> sums of the stage's objective."""
        return jax.jit(make_evaluation_step(self.graphdef, self.objective(stage)))

    def log_prob_step(self, stage: Stage) -> Callable[[nnx.State, Batch], jax.Array]:
        """(params, batch) -> the log-probability [B, T] of each segment."""

        def log_probs(params: nnx.State, batch: Batch) -> jax.Array:
            model = nnx.merge(self.graphdef, params)
            return segment_log_probs(model, self._config.model, batch, stage.config.rope_theta)[0]

        return jax.jit(log_probs, out_shardings=self._rows)

    def policy_log_prob_step(self, stage: Stage) -> Callable[[nnx.State, Batch], jax.Array]:
        """(params, batch) -> the log-probability [B, T] of each target at the temperature of the stage's rollouts."""

        def log_probs(params: nnx.State, batch: Batch) -> jax.Array:
            model, temperature = nnx.merge(self.graphdef, params), stage.config.reinforcement.rollouts.temperature
            rope_theta = stage.config.rope_theta
            return sequence_log_probs(model, self._config.model, batch, temperature=temperature, rope_theta=rope_theta)[
                0
            ]

        return jax.jit(log_probs, out_shardings=self._rows)

    def by_rows(
        self, stage: Stage, step: Callable[[nnx.State, Batch], jax.Array], params: nnx.State, rows: HostBatch
    ) -> np.ndarray:
        """`step` of any number of rows [N, T] that every process has, some at a time, on every process."""
        count, num_rows = self.evaluation_rows(stage), len(rows["inputs"])
        share = count // self.host.count
        results = []
        for first in range(0, num_rows, count):
            # Rows are taken again to fill the last batch: every batch is one shape.
            taken = np.resize(np.arange(first, min(first + count, num_rows)), count)
            own = taken[self.host.index * share : (self.host.index + 1) * share]
            batch = self.on_devices({name: array[own] for name, array in rows.items()})
            results.append(np.asarray(multihost_utils.process_allgather(step(params, batch), tiled=True)))
        return np.concatenate(results)[:num_rows]

    def to_generate(self, params: nnx.State) -> tuple[Mesh, nnx.State]:
        """The mesh on which completions are generated, where axis "sequence" serves rows, and the parameters on it."""
        mesh = parallel.without_sequence(self.mesh)
        return mesh, jax.device_put(params, parallel.shardings(params, mesh))

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
        return build_optimizer(stage.config.optimizer, self._learning_rate(stage))

    def on_devices(self, batch: HostBatch) -> Batch:
        """The global batch of which this is the host's part."""
        count = self.host.count
        return {
            name: jax.make_array_from_process_local_data(self._rows, array, (count * len(array), *array.shape[1:]))
            for name, array in batch.items()
        }

    def _learning_rate(self, stage: Stage) -> Callable[[jax.Array], jax.Array]:
        return learning_rate(stage.config.schedule, stage.batch_sizes.num_steps)
