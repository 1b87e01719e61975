"""LoRA: frozen weights W with a trained change of low rank beside them, W + alpha / rank * down up.

Source: arXiv 2106.09685 section 4.1; `down` starts as Gaussian noise and `up` as zero, so that training begins at the
model itself.

The states here: "plain" is that of the model without adapters; "adapted" has for each target its weight, down and up.

Shapes: D inputs, F outputs, r rank; axes of stacked layers and of experts come before them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lightning_jax.models.config import LoraConfig


class Adapter(nnx.Param):
    """A matrix that is trained beside a frozen one."""


class LowRank(nnx.Module):
    """A weight [..., D, F] with its change, in the weight's place in a layer; `low_rank[...]` is their sum."""

    def __init__(self, weight: nnx.Param, config: LoraConfig, *, rngs: nnx.Rngs):
        *stacked, D, F = weight.get_value().shape
        axes = weight.get_metadata("logical_axes")
        # Steps of the adapters are small beside them, and would be lost in bfloat16.
        dtype = jnp.promote_types(weight.get_value().dtype, jnp.float32)
        noise = jax.random.normal(rngs.params(), (*stacked, D, config.rank), dtype) / math.sqrt(D)
        self.scale = config.scale
        self.weight = weight
        self.down = Adapter(noise, logical_axes=(*axes[:-1], None))
        self.up = Adapter(jnp.zeros((*stacked, config.rank, F), dtype), logical_axes=(*axes[:-2], None, axes[-1]))

    def __getitem__(self, index: Any) -> jax.Array:
        return merge(self.weight[...], self.down[...], self.up[...], self.scale)[index]

    def project(self, x: jax.Array, project: Callable[[jax.Array, nnx.Param], jax.Array]) -> jax.Array:
        """x times the sum, without forming it: so no gradient of the size of the weight is formed either."""
        return project(x, self.weight) + self.scale * project(project(x, self.down), self.up)


def merge(weight: jax.Array, down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    """weight + scale * down up, in the dtype of the weight."""
    change = scale * jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(change.dtype) + change).astype(weight.dtype)


def adapt(model: Any, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Puts adapters beside the targets in all layers of a language model or of what has one as `backbone`."""
    for stack in getattr(model, "backbone", model).stacks:
        for run in stack.runs:
            for target in config.targets:
                part, name = target.split(".")
                owner = getattr(run, part)
                if hasattr(owner, name):
                    setattr(owner, name, LowRank(getattr(owner, name), config, rngs=rngs))


def split(adapted: nnx.State) -> tuple[nnx.State, nnx.State]:
    """(what is trained: adapters, and what a reward model has besides its backbone; what is frozen)."""
    head = nnx.Not(nnx.PathContains("backbone")) if "backbone" in adapted else nnx.Nothing()
    return nnx.split_state(adapted, nnx.Any(Adapter, head), ...)


def merged(adapted: nnx.State, config: LoraConfig) -> nnx.State:
    """The plain state of the model that computes the same."""
    flat = dict(nnx.to_flat_state(adapted))
    for path in [path[:-1] for path, leaf in flat.items() if isinstance(leaf, Adapter) and path[-1] == "up"]:
        weight, down, up = (flat.pop((*path, name)) for name in ("weight", "down", "up"))
        flat[path] = weight.replace(merge(weight[...], down[...], up[...], config.scale))
    return nnx.from_flat_state(flat)


def frozen_of(plain: nnx.State, config: LoraConfig) -> nnx.State:
    """A plain state, or a part of one, under the paths of the adapted model."""

    def path_of(path: tuple) -> tuple:
        return (*path, "weight") if _name(path) in config.targets else path

    return nnx.from_flat_state({path_of(path): leaf for path, leaf in nnx.to_flat_state(plain)})


def plain_of(frozen: nnx.State, config: LoraConfig) -> nnx.State:
    """The inverse of `frozen_of`."""

    def path_of(path: tuple) -> tuple:
        return path[:-1] if path[-1] == "weight" and _name(path[:-1]) in config.targets else path

    return nnx.from_flat_state({path_of(path): leaf for path, leaf in nnx.to_flat_state(frozen)})


def _name(path: tuple) -> str:
    """What a config calls a weight: `mixer.query`."""
    return ".".join(map(str, path[-2:]))
