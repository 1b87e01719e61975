"""Training states for the tests of checkpoints, and equality of their bits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lightning_jax.checkpoints import CheckpointConfig, Checkpoints

KEEP_ALL = CheckpointConfig(every_steps=1, every_minutes=0.0, keep_newest=100, keep_every_steps=0, max_failures=3)


class TwoLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.second = nnx.Param(jax.random.normal(rngs.params(), (16, 8), jnp.bfloat16), logical_axes=("mlp", "embed"))


def training_state(seed: int) -> dict:
    """Parameters of a Flax model, an optax state of nested named tuples, a PRNG key, a step."""
    params = nnx.state(TwoLayers(nnx.Rngs(seed)), nnx.Param)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, optimizer_state = optimizer.update(params, optimizer.init(params), params)
    return {"params": params, "optimizer": optimizer_state, "key": jax.random.key(seed), "step": jnp.int32(seed)}


def arrays(seed: int, size: int = 64) -> dict[str, jax.Array]:
    """Plain arrays with incompressible bits."""
    generator = np.random.default_rng(seed)
    return {name: jnp.asarray(generator.standard_normal((8, size), np.float32)) for name in ("w1", "w2", "w3")}


def abstract(state: object, sharding: jax.sharding.Sharding | None = None) -> object:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(lambda: state)
    )


def bits(leaf: jax.Array) -> tuple[str, tuple[int, ...], bytes]:
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return str(leaf.dtype), leaf.shape, np.asarray(data).tobytes()


def assert_same_bits(found: object, expected: object) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert bits(one) == bits(other)


def save_steps(folder: object, steps: range | list[int], **sizes: int) -> None:
    """Checkpoints of `arrays(step)`."""
    with Checkpoints(folder, KEEP_ALL) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, arrays(step, **sizes), {"step": step}, wait=True)


def data_file(step: Path) -> Path:
    """The file of a checkpoint that holds most of its arrays."""
    return max(filter(Path.is_file, (step / "arrays").rglob("*")), key=lambda path: path.stat().st_size)
