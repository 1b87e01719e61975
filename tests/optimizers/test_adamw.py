"""AdamW against torch's (goldens), against numpy in float64, and at the edge of float32."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lightning_jax.optimizers import OptimizerConfig, build_optimizer

GOLDENS = json.loads((pathlib.Path(__file__).parents[1] / "goldens" / "adamw.json").read_text())


def adamw(**changes) -> OptimizerConfig:
    config = {
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 0.1,
        "decay_mask": "all",
        "clip_norm": 0.0,
        "moment_dtype": "float32",
    }
    return OptimizerConfig(**config | changes)


def run(config: OptimizerConfig, learning_rate, start, gradients) -> list[jax.Array]:
    optimizer = build_optimizer(config, learning_rate)
    params, state, trajectory = start, optimizer.init(start), []
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(gradient, state, params, step=step)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


def run_in_numpy(config: OptimizerConfig, learning_rate, start, gradients) -> list[np.ndarray]:
    """Algorithm 2 of arXiv 1711.05101, line by line in float64, for one array."""
    theta, m, v, trajectory = np.float64(start), 0.0, 0.0, []
    for t, gradient in enumerate(np.float64(gradients), start=1):
        norm = np.sqrt((gradient**2).sum())
        if config.clip_norm and norm > config.clip_norm:
            gradient = gradient * config.clip_norm / norm
        m = config.beta1 * m + (1 - config.beta1) * gradient
        v = config.beta2 * v + (1 - config.beta2) * gradient**2
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        direction = m_hat / (np.sqrt(v_hat) + config.epsilon) + config.weight_decay * theta
        theta = theta - learning_rate(t - 1) * direction
        trajectory.append(theta)
    return trajectory


@pytest.mark.parametrize("name", GOLDENS)
def test_trajectory_equals_torch(name):
    golden = GOLDENS[name]
    beta1, beta2 = golden["betas"]
    config = adamw(
        beta1=beta1,
        beta2=beta2,
        epsilon=golden["eps"],
        weight_decay=golden["weight_decay"],
        clip_norm=golden["clip"],
    )
    gradients = jnp.asarray(golden["gradients"], jnp.float32)
    params = run(config, lambda step: golden["lr"], jnp.asarray(golden["start"], jnp.float32), gradients)
    moved = np.array(golden["params"]) - golden["start"]
    np.testing.assert_allclose(np.array(params) - golden["start"], moved, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12, 1e-15, 1e-18, 1e-22])
def test_tiny_gradients_move_as_in_float64(scale):
    config = adamw(epsilon=1e-15, weight_decay=0.0)
    gradients = np.random.default_rng(0).normal(size=(20, 16)) * scale
    start, rate = np.zeros(16), 1e-3
    ours = run(config, lambda step: rate, jnp.asarray(start, jnp.float32), jnp.asarray(gradients, jnp.float32))
    exact = run_in_numpy(config, lambda step: rate, start, gradients)
    np.testing.assert_allclose(ours[-1], exact[-1], rtol=2e-3, atol=1e-3 * float(np.abs(exact[-1]).max()))


def test_schedule_clipping_and_decay_equal_float64():
    config = adamw(clip_norm=0.5)
    gradients = np.random.default_rng(1).normal(size=(30, 4, 3))
    start = np.random.default_rng(2).normal(size=(4, 3))

    def rate(step):
        return 1e-2 / (1 + step)

    ours = run(config, rate, jnp.asarray(start, jnp.float32), jnp.asarray(gradients, jnp.float32))
    np.testing.assert_allclose(ours[-1], run_in_numpy(config, rate, start, gradients)[-1], rtol=2e-6)


def stacked_params() -> nnx.State:
    """One matrix, one norm and one embedding; the first two stacked over five layers."""
    return nnx.State(
        {
            "matrix": nnx.Param(jnp.ones((5, 4, 3)), logical_axes=("embed", "mlp")),
            "norm": nnx.Param(jnp.ones((5, 4)), logical_axes=("embed",)),
            "embedding": nnx.Param(jnp.ones((7, 4)), logical_axes=("vocab", "embed")),
        }
    )


@pytest.mark.parametrize(("mask", "norm_after"), [("matrices", 1.0), ("all", 0.99)])
def test_stacked_norms_decay_only_where_everything_does(mask, norm_after):
    optimizer = build_optimizer(adamw(decay_mask=mask), lambda step: 0.1)
    params = stacked_params()

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params, step=0)
        return optax.apply_updates(params, updates)

    after = step(params, optimizer.init(params))
    np.testing.assert_allclose(after["matrix"][...], 0.99, rtol=1e-6)
    np.testing.assert_allclose(after["embedding"][...], 0.99, rtol=1e-6)
    np.testing.assert_allclose(after["norm"][...], norm_after, rtol=1e-6)


def test_matrices_cannot_be_told_without_logical_axes():
    optimizer = build_optimizer(adamw(decay_mask="matrices"), lambda step: 0.1)
    with pytest.raises(ValueError, match=r"parameter \['w'\] carries no logical_axes"):
        optimizer.init({"w": jnp.ones((2, 2))})


def test_state_goes_on_from_stage_to_stage():
    params = stacked_params()
    stages = [
        adamw(clip_norm=1.0, decay_mask="matrices"),
        adamw(clip_norm=0.0, decay_mask="all", beta2=0.999, weight_decay=0.0),
    ]
    states = [build_optimizer(config, lambda step: 0.1).init(params) for config in stages]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_moments_are_stored_as_configured_and_params_keep_their_dtype(param_dtype, moment_dtype):
    optimizer = build_optimizer(adamw(moment_dtype=moment_dtype), lambda step: 1e-2)
    params = {"w": jnp.ones((3,), param_dtype)}
    state = optimizer.init(params)
    updates, after = optimizer.update({"w": jnp.ones((3,), param_dtype)}, state, params, step=3)
    assert optax.apply_updates(params, updates)["w"].dtype == param_dtype
    for each in (state, after):
        adam = optax.tree.get(each, "mu"), optax.tree.get(each, "nu")
        assert {leaf.dtype for leaf in jax.tree.leaves(adam)} == {jnp.dtype(moment_dtype)}


def test_bfloat16_moments_stay_close_to_float32():
    gradients = jnp.asarray(np.random.default_rng(3).normal(size=(50, 64)), jnp.float32)
    start = jnp.zeros(64)
    exact, rounded = (
        run(adamw(moment_dtype=dtype), lambda step: 1e-2, start, gradients)[-1] for dtype in ("float32", "bfloat16")
    )
    assert 0 < float(jnp.abs(exact - rounded).max()) < 0.03 * float(jnp.abs(exact).max())


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"beta2": 1.0}, "beta2"), ({"epsilon": 0.0}, "epsilon"), ({"weight_decay": -0.1}, "weight_decay")],
)
def test_problems_name_the_field(changes, field):
    assert [problem.split(":")[0] for problem in adamw(**changes).problems()] == [field]
    assert adamw(epsilon=1e-15).problems() == []
