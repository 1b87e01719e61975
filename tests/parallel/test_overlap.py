"""Collectives of a layer's experts travel while the TPU computes: what the compiler makes of them for a slice."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from tiny_hybrid import config

from lightning_jax import parallel
from lightning_jax.models.experts import ExpertWeights
from lightning_jax.planning.compiled import described_devices
from lightning_jax.planning.hardware import parse_slice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler: pip install libtpu"
    ),
]

LAYERS, ROWS, LENGTH, D, F, EXPERTS = 3, 8, 1024, 512, 1024, 8


def compiled_layers(gradient_dtype: str) -> str:
    """The scheduled program of the gradient of a scan over layers of experts, each behind a product, in bfloat16."""
    mesh = parallel.make_mesh(parallel.MeshConfig.of(fsdp=2, expert=2), described_devices(parse_slice("v5p:2x2x1")))
    model = dataclasses.replace(config("capacity", "bfloat16"), num_experts=EXPERTS, capacity_group=LENGTH)
    operators = parallel.operators(mesh, model, "ring", gradient_dtype)

    def loss(layers, x_BTD):
        def layer(x_BTD, weights):
            product, experts = weights
            x_BTD = x_BTD + jnp.tanh(operators.project(x_BTD, nnx.Param(product)))
            expert_BTk = jnp.argsort(x_BTD[..., :EXPERTS], axis=-1)[..., -2:].astype(jnp.int32)
            weight_BTk = jax.nn.softmax(x_BTD[..., :2].astype(jnp.float32))
            mask_BT = jnp.ones(x_BTD.shape[:2], bool)
            return x_BTD + operators.experts(x_BTD, expert_BTk, weight_BTk, experts, mask_BT=mask_BT)[0], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x_BTD, layers)[0].astype(jnp.float32) ** 2)

    def weight(axes, *shape):
        spec = parallel.RULES.spec(axes, (LAYERS, *shape), mesh)
        return jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32, sharding=NamedSharding(mesh, spec))

    inside = ("experts", "expert_embed", "expert_mlp"), EXPERTS, D, F
    outside = ("experts", "expert_mlp", "expert_embed"), EXPERTS, F, D
    layers = (
        weight(("embed", None), D, D),
        ExpertWeights(*(weight(axes, *shape) for axes, *shape in (inside, inside, outside))),
    )
    x_BTD = jax.ShapeDtypeStruct((ROWS, LENGTH, D), jnp.bfloat16, sharding=parallel.batch_sharding(mesh))
    return jax.jit(jax.grad(loss)).lower(layers, x_BTD).compile().as_text()
