"""A step that is not finite leaves everything as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lightning_jax.optimizers import OptimizerConfig, build_optimizer, is_finite, where_finite

CONFIG = OptimizerConfig(0.9, 0.95, 1e-8, 0.1, "all", 1.0, "float32")


@jax.jit
def train_step(params, state, gradients, loss):
    optimizer = build_optimizer(CONFIG, lambda step: 1e-2)
    finite = is_finite(loss, optax.tree.norm(gradients))
    updates, state = optimizer.update(gradients, state, params, step=0, finite=finite)
    return where_finite(finite, optax.apply_updates(params, updates), params), state


@pytest.mark.parametrize(
    ("bad", "loss"), [(jnp.nan, 1.0), (jnp.inf, 1.0), (-jnp.inf, 1.0), (1e20, 1.0), (0.5, jnp.nan)]
)
def test_every_bad_step_in_a_row_leaves_params_moments_and_count_alone(bad, loss):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    state = build_optimizer(CONFIG, lambda step: 1e-2).init(params)
    good = jax.tree.map(jnp.ones_like, params)
    before = train_step(params, state, good, jnp.float32(1.0))
    after = before
    for _ in range(6):
        after = train_step(*after, {**good, "w": good["w"].at[0, 1].set(bad)}, jnp.float32(loss))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    again, _ = train_step(*after, good, jnp.float32(1.0))
    assert not np.array_equal(again["w"], before[0]["w"])
