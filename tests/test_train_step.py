"""Accumulation equals the large batch, and what is not finite touches nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lightning_jax.optimizers import OptimizerConfig, build_optimizer
from lightning_jax.train_step import TrainState, accumulated_sums, make_train_step, mapped_rows

ADAM = optax.with_extra_args_support(optax.adam(0.1))


class _Scale(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.array([0.5, -1.0]))


class _ProductOfMeans:
    """A loss that, like the MoE balance loss, is no sum over micro-batches."""

    def sums(self, model, batch):
        y = batch["x"] * model.weight.get_value()
        return {"first": y[..., 0].sum(), "second": (y[..., 1] ** 2).sum(), "count": jnp.float32(batch["x"].shape[0])}

    def loss(self, sums):
        loss = (sums["first"] / sums["count"]) * (sums["second"] / sums["count"])
        return loss, {"loss": loss}


def _state_and_batch(dtype=jnp.float32, optimizer=ADAM):
    graphdef, params = nnx.split(_Scale(), nnx.Param)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
    batch = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(12, 2)), dtype)}
    return graphdef, optimizer, state, batch


def _step(graphdef, objective, optimizer, num_micro_batches):
    return jax.jit(
        make_train_step(
            graphdef, objective, optimizer, lambda step: 0.1 * step, first_step=0, num_micro_batches=num_micro_batches
        )
    )


@pytest.mark.parametrize("num_micro_batches", [2, 3, 12])
def test_accumulated_step_equals_large_batch_for_a_loss_that_is_no_sum(num_micro_batches):
    with jax.enable_x64(True):
        graphdef, optimizer, state, batch = _state_and_batch(jnp.float64)
        objective = _ProductOfMeans()
        whole, metrics = _step(graphdef, objective, optimizer, 1)(state, batch)
        parts, metrics_of_parts = _step(graphdef, objective, optimizer, num_micro_batches)(state, batch)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        np.testing.assert_allclose(metrics["gradient_norm"], metrics_of_parts["gradient_norm"], rtol=1e-12)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 6])
def test_rows_that_micro_batches_computed_are_in_their_places(num_micro_batches):
    x_RT = jnp.arange(12.0).reshape(6, 2)
    found = mapped_rows(lambda batch: batch["x"] * 2, {"x": x_RT}, num_micro_batches)
    np.testing.assert_array_equal(found, 2 * x_RT)


def test_micro_batches_cover_every_row_once():
    rows = jnp.arange(12.0)
    total = accumulated_sums(
        lambda batch: {"sum": batch["x"].sum(), "squares": (batch["x"] ** 2).sum()}, {"x": rows}, 4
    )
    assert total == {"sum": 66.0, "squares": 506.0}


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_neither_parameters_nor_moments(poison):
    config = OptimizerConfig(0.9, 0.95, 1e-8, 0.1, "all", 1.0, "float32")
    graphdef, optimizer, state, batch = _state_and_batch(optimizer=build_optimizer(config, lambda step: 0.1))
    step = _step(graphdef, _ProductOfMeans(), optimizer, 1)
    state, _ = step(state, batch)
    bad = {"x": batch["x"].at[3, 0].set(poison)}
    for count in (1, 2, 3, 4, 5):  # optax.apply_if_finite would let one of these through
        after, metrics = step(state._replace(nonfinite_steps=jnp.int32(count - 1)), bad)
        for a, b in zip(jax.tree.leaves(state[1:3]), jax.tree.leaves(after[1:3]), strict=True):
            np.testing.assert_array_equal(a, b)
        assert metrics["nonfinite_steps"] == count
        assert after.step == state.step + 1
    after, metrics = step(after, batch)
    assert metrics["nonfinite_steps"] == 0
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True)
    )
