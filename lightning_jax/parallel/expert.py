"""Expert parallelism: the mesh axis "expert" splits both the experts and the batch, so tokens travel to their experts.

"capacity" exchanges places all to all: a device sends each expert's places of its own rows to the device that holds
the expert, and gets them back computed. It moves k * capacity_factor vectors per token each way and computes no more
than that, but drops tokens. The dropless dispatches gather the tokens of all devices along the axis, compute the local
experts' part of the sum for all of them and reduce-scatter the parts: exact for any imbalance in buffers of fixed
size, moving (devices - 1) vectors per token each way. So they move less up to devices = k * capacity_factor + 1 and
more beyond; and the device with the most popular experts keeps the others waiting.

Sources: GShard (arXiv 2006.16668) section 3; MiniMax-01 (arXiv 2501.08313) section 2.1 and 3.1.

Shapes: B batch rows here, X devices along "expert", T sequence, D model dim, E experts, F feed-forward dim,
k experts per token, C places per expert and row.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lightning_jax.models.config import ModelConfig
from lightning_jax.models.experts import (
    ExpertWeights,
    batched_swiglu,
    dispatch_by_capacity,
    dropless_experts,
    for_platform,
)
from lightning_jax.parallel.sharding import RULES

BATCH = RULES.mesh_axes("batch")
SEQUENCE = RULES.mesh_axes("sequence")
EMBED = RULES.mesh_axes("embed")
EXPERTS = RULES.mesh_axes("experts")
MLP = RULES.mesh_axes("mlp")


class ParallelExperts:
    """The `experts` operator over a mesh; equal to the one-device operator in values and gradients."""

    def __init__(self, mesh: Mesh, config: ModelConfig):
        self.mesh = mesh
        self.capacity_factor = config.capacity_factor
        self.dispatch = for_platform(config.expert_dispatch, mesh.devices.flat[0].platform)

    def __call__(
        self,
        x_BTD: jax.Array,
        expert_BTk: jax.Array,
        weight_BTk: jax.Array,
        weights: ExpertWeights,
        *,
        mask_BT: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """As `models.experts.experts`, on arrays of global shape."""
        rows = PartitionSpec(BATCH, SEQUENCE)
        split = ExpertWeights(
            gate_EDF=PartitionSpec(EXPERTS, EMBED, MLP),
            up_EDF=PartitionSpec(EXPERTS, EMBED, MLP),
            down_EFD=PartitionSpec(EXPERTS, MLP, EMBED),
        )
        compute = self._capacity if self.dispatch == "capacity" else self._dropless
        return jax.shard_map(
            # The backward pass gathers again: kept, the weights of all layers would fill what "fsdp" saves.
            jax.checkpoint(compute, policy=_is_local),
            mesh=self.mesh,
            in_specs=(rows, rows, rows, split, rows),
            out_specs=(rows, PartitionSpec()),
            # The dispatches' loops start from constants, which the check takes for values that differ by device.
            check_vma=False,
        )(x_BTD, expert_BTk, weight_BTk, weights, mask_BT)

    def _capacity(self, x_BTD, expert_BTk, weight_BTk, weights, mask_BT):
        weights = _gather_embed(weights)
        num_experts = weights.gate_EDF.shape[0] * jax.lax.axis_size(EXPERTS)
        places = dispatch_by_capacity(expert_BTk, mask_BT, num_experts, self.capacity_factor)
        x_BECD = places.gather(x_BTD)
        # [B, E, ...] of these rows and all experts <-> [B * X, E / X, ...] of all rows and these experts.
        x_BECD = jax.lax.all_to_all(x_BECD, EXPERTS, split_axis=1, concat_axis=0, tiled=True)
        y_BECD = batched_swiglu(x_BECD, weights)
        y_BECD = jax.lax.all_to_all(y_BECD, EXPERTS, split_axis=0, concat_axis=1, tiled=True)
        weight_BTk = jnp.where(mask_BT[..., None], weight_BTk, 0)
        y_BTD = places.combine(y_BECD, weight_BTk).astype(x_BTD.dtype)
        return jax.lax.psum(y_BTD, MLP), jax.lax.psum(places.dropped, (*BATCH, *SEQUENCE))

    def _dropless(self, x_BTD, expert_BTk, weight_BTk, weights, mask_BT):
        weights = _gather_embed(weights)
        weight_BTk = jnp.where(mask_BT[..., None], weight_BTk, 0)
        rows = jax.tree.map(
            lambda x: jax.lax.all_gather(x, EXPERTS, axis=0, tiled=True), (x_BTD, expert_BTk, weight_BTk)
        )
        first_expert = jax.lax.axis_index(EXPERTS) * weights.gate_EDF.shape[0]
        y_BTD = dropless_experts(*rows, weights, first_expert=first_expert, dispatch=self.dispatch)
        y_BTD = jax.lax.psum_scatter(y_BTD.astype(x_BTD.dtype), EXPERTS, scatter_dimension=0, tiled=True)
        return jax.lax.psum(y_BTD, MLP), jnp.zeros((), jnp.float32)


def _is_local(primitive, *_, **__) -> bool:
    """Whether the backward pass may keep what a primitive computed: all but what it gathered from other devices."""
    return primitive.name != "all_gather"


def _gather_embed(weights: ExpertWeights) -> ExpertWeights:
    """The local experts' matrices with their model dim whole; the gradient is reduce-scattered."""

    def gather(weight: jax.Array, axis: int) -> jax.Array:
        return jax.lax.all_gather(weight, EMBED, axis=axis, tiled=True)

    return ExpertWeights(gather(weights.gate_EDF, 1), gather(weights.up_EDF, 1), gather(weights.down_EFD, 2))
