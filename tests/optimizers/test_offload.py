"""Moments in the host's memory: the same numbers, and that much less of the devices' memory."""

import functools
import importlib.util
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lightning_jax import parallel
from lightning_jax.errors import UserError
from lightning_jax.optimizers import OptimizerConfig, build_optimizer
from lightning_jax.planning.compiled import described_devices
from lightning_jax.planning.hardware import parse_slice

CONFIG = OptimizerConfig(0.9, 0.95, 1e-8, 0.1, "matrices", 1.0, "float32")
LAYERS = (3, 2)


def params(size=8, layers=LAYERS):
    """A matrix and a norm stacked over layers, and an embedding."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return nnx.State(
        {
            "matrix": nnx.Param(draw(*layers, size, size), logical_axes=("embed", None)),
            "norm": nnx.Param(draw(*layers, size), logical_axes=(None,)),
            "embedding": nnx.Param(draw(3, size), logical_axes=(None, "embed")),
        }
    )


def optimizer(place, config=CONFIG):
    return build_optimizer(config, lambda step: 1e-2, moments_on_host=place == "host")


def shardings(place, shapes, mesh):
    found = parallel.shardings(shapes, mesh)
    return (found[0], parallel.on_host(found[1], shapes[1], mesh) if place == "host" else found[1])


def step(place, params, state, gradients, finite=True):
    updates, state = optimizer(place).update(gradients, state, params, step=0, finite=finite)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_an_update_in_turns_has_the_bits_of_one_at_once(moment_dtype):
    config = OptimizerConfig(**CONFIG.__dict__ | {"moment_dtype": moment_dtype})
    start, gradients = params(), jax.tree.map(jnp.sin, params())
    with jax.disable_jit():  # compiled, the two are rounded as the compiler fuses them
        results = []
        for place in ("device", "host"):
            state = optimizer(place, config).init(start)
            if place == "host":
                mesh = parallel.make_mesh(parallel.MeshConfig.of(), jax.devices()[:1])
                state = jax.device_put(state, shardings(place, (start, state), mesh)[1])
            for number in range(2):
                updates, state = optimizer(place, config).update(gradients, state, start, step=number)
            results.append((updates, state))
    for expected, found in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_compiled_the_moments_come_from_the_host_and_go_back_unless_the_step_is_not_finite():
    mesh = parallel.make_mesh(parallel.MeshConfig.of(fsdp=4), jax.devices()[:4])
    start = params()
    gradients = jax.tree.map(jnp.sin, start)
    results = {}
    for place in ("device", "host"):
        shapes = jax.eval_shape(lambda place=place: (params(), optimizer(place).init(params())))
        places = shardings(place, shapes, mesh)
        state = jax.jit(optimizer(place).init, out_shardings=places[1])(start)
        compiled = jax.jit(functools.partial(step, place), out_shardings=places, donate_argnums=(0, 1))
        new, state = compiled(jax.jit(params, out_shardings=places[0])(), state, gradients, True)
        results[place] = jax.device_get((new, state))
        _, unchanged = compiled(new, state, gradients, False)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(unchanged), results[place][1])
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(unchanged) if leaf.ndim}
        assert kinds == {"pinned_host" if place == "host" else "device"}
    for expected, found in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_a_platform_that_does_not_reach_its_host_is_refused_in_a_line():
    device = SimpleNamespace(
        device_kind="Chip v1", addressable_memories=lambda: [SimpleNamespace(kind=kind) for kind in ("hbm", "device")]
    )
    mesh = SimpleNamespace(devices=np.array([device]))
    message = rf"^mesh\.moments: with jax {re.escape(jax.__version__)} Chip v1 does not reach its host's memory "
    with pytest.raises(UserError, match=message + r"\(pinned_host\), only device, hbm; use device$"):
        parallel.on_host({}, {}, mesh)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler: pip install libtpu")
def test_on_a_tpu_the_devices_hold_no_moments_but_of_a_layer_at_a_time():
    mesh = parallel.make_mesh(parallel.MeshConfig.of(fsdp=4), described_devices(parse_slice("v5p:2x2x1")))

    def draw():
        return params(2048, layers=(6, 4))  # more than the 96 MB of a core's own memory, which is not counted

    shapes = jax.eval_shape(lambda: (draw(), optimizer("device").init(draw())))

    def memory(place):
        def whole_step(params, state):  # gradients are not an argument, but made by the step, all at once
            return step(place, params, state, jax.lax.optimization_barrier(jax.tree.map(jnp.sin, params)))

        places = shardings(place, shapes, mesh)
        given = jax.tree.map(lambda shape, sharding: shape.update(sharding=sharding), shapes, places)
        compiled = jax.jit(whole_step, out_shardings=places, donate_argnums=(0, 1))
        return compiled.lower(*given).compile().memory_analysis()

    here, there = memory("device"), memory("host")
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes[0])) / 4  # of a device, norms are split as well
    assert here.argument_size_in_bytes - there.argument_size_in_bytes == pytest.approx(2 * weights, rel=0.01)
    assert there.host_argument_size_in_bytes == pytest.approx(2 * weights, rel=0.01)
    assert there.host_temp_size_in_bytes < 0.01 * weights  # donated; the norms' are padded
    layer = 2048 * 2048 * 4 / 4
    # The loop's updates are an array of their own, as large as the weights: the clipped gradients it begins with.
    assert there.temp_size_in_bytes - here.temp_size_in_bytes < weights + 6 * layer
