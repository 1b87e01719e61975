"""One optimizer step as a pure function, for any objective, number of micro-batches and layout across devices.

The loss is a function of sums over tokens, so micro-batches are summed first and the loss taken once: gradient
accumulation gives the large batch's gradient, the MoE balance loss included, whose product of means no sum of
micro-batch losses could give.

Shapes: R rows of the global batch, T sequence, A micro-batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lightning_jax.optimizers import is_finite, where_finite

Batch = dict[str, jax.Array]
Sums = Any  # a pytree of arrays that add over tokens


class Objective(Protocol):
    """What is minimised: sums over tokens, and a loss that is a function of them."""

    def sums(self, model: nnx.Module, batch: Batch) -> Sums: ...

    def loss(self, sums: Sums) -> tuple[jax.Array, dict[str, jax.Array]]: ...


class TrainState(NamedTuple):
    """Everything that a step reads and writes, and so everything a checkpoint must hold."""

    step: jax.Array  # steps of the run done, int32
    params: nnx.State
    opt_state: optax.OptState
    nonfinite_steps: jax.Array  # skipped in a row until now, int32


def micro_batches_of(batch: Batch, count: int) -> Batch:
    """The arrays of a batch as [A, R / A, ...]: each takes every A-th row, so that it stays spread over all devices."""
    return jax.tree.map(lambda x_RX: x_RX.reshape(-1, count, *x_RX.shape[1:]).swapaxes(0, 1), batch)


def mapped_rows(function: Callable[[Batch], jax.Array], batch: Batch, num_micro_batches: int) -> jax.Array:
    """`function(batch)`, an array [R, ...], computed over micro-batches one after the other."""
    if num_micro_batches == 1:
        return function(batch)
    y_ARX = jax.lax.map(function, micro_batches_of(batch, num_micro_batches))
    return y_ARX.swapaxes(0, 1).reshape(-1, *y_ARX.shape[2:])


def accumulated_sums(sums: Callable[[Batch], Sums], batch: Batch, num_micro_batches: int) -> Sums:
    """`sums(batch)`, computed over micro-batches one after the other; each is rematerialised in the backward pass."""
    if num_micro_batches == 1:
        return sums(batch)

    def add(total: Sums, micro_batch: Batch) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(sums)(micro_batch)), None

    micro_batches = micro_batches_of(batch, num_micro_batches)
    shapes = jax.eval_shape(sums, jax.tree.map(lambda x: x[0], micro_batches))
    zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zero, micro_batches)[0]


def make_train_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    first_step: int,
    num_micro_batches: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step `(state, batch, *frozen) -> (state, metrics)` of a stage that begins at `first_step`, to be jitted.

    `frozen` is what of the model is not in `state.params`, and so is not trained.

    `optimizer` and `learning_rate` are functions of the stage's step; the latter is only reported. The optimizer is
    given `finite` too, and leaves its state alone where that is false, as those of `build_optimizer` do.

    `batch` holds arrays [R, T]. Where the loss or a gradient is not finite the update is skipped before it touches
    parameters or moments; the step still counts, so that the data go on.
    """

    def train_step(state: TrainState, batch: Batch, *frozen: nnx.State) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(params: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
            model = nnx.merge(graphdef, params, *frozen)
            return objective.loss(accumulated_sums(lambda each: objective.sums(model, each), batch, num_micro_batches))

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        gradient_norm = optax.tree.norm(gradients)
        finite = is_finite(value, gradient_norm)
        step_of_stage = state.step - first_step
        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, step=step_of_stage, finite=finite
        )
        params = where_finite(finite, optax.apply_updates(state.params, updates), state.params)
        skipped = jnp.where(finite, 0, state.nonfinite_steps + 1)
        metrics = metrics | {
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate(step_of_stage),
            "nonfinite_steps": skipped,
        }
        return TrainState(state.step + 1, params, opt_state, skipped), metrics

    return train_step


def make_evaluation_step(graphdef: nnx.GraphDef, objective: Objective) -> Callable[[nnx.State, Batch], Sums]:
    """The step `(params, batch) -> sums`, to be jitted; sums of several batches add."""

    def evaluation_step(params: nnx.State, batch: Batch) -> Sums:
        return objective.sums(nnx.merge(graphdef, params), batch)

    return evaluation_step
