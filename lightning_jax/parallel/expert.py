"""Expert parallelism: the mesh axis "expert" splits both the experts and the batch, so tokens travel to their experts.
Expert tensor parallelism: "expert_tensor" splits the batch and each expert's feed-forward dim, without "tensor" and the
heads having to be split as finely; its devices gather one another's tokens and reduce-scatter the parts of their sums.

"capacity" exchanges places all to all: a device sends each expert's places of its own groups of tokens to the device
that holds the expert, and gets them back computed. It moves k * capacity_factor vectors per token each way and computes
no more than that, but drops tokens; a group lies on one device, so that the layout does not change which. The dropless
dispatches gather the tokens of all devices along the axis, compute the local experts' part of the sum for all of them
and reduce-scatter the parts: exact for any imbalance in buffers of fixed size, moving (devices - 1) vectors per token
each way. So they move less up to devices = k * capacity_factor + 1 and more beyond; and the device with the most
popular experts keeps the others waiting.

Sources: GShard (arXiv 2006.16668) section 3; MiniMax-01 (arXiv 2501.08313) section 2.1, and 3.1 for ETP.

Shapes: B batch rows here, X devices along "expert", Z along "expert_tensor", T sequence, D model dim, E experts,
F feed-forward dim, k experts per token, C places per expert and group of tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lightning_jax.models.config import ModelConfig
from lightning_jax.models.experts import (
    ExpertWeights,
    batched_swiglu,
    dropless_experts,
    experts_by_capacity,
    for_platform,
)
from lightning_jax.parallel.config import GradientDtype
from lightning_jax.parallel.sharding import RULES, ShardingError

BATCH = RULES.mesh_axes("batch")
SEQUENCE = RULES.mesh_axes("sequence")
EMBED = RULES.mesh_axes("expert_embed")
EXPERTS = RULES.mesh_axes("experts")
MLP = RULES.mesh_axes("expert_mlp")
EXPERT_TENSOR = tuple(axis for axis in MLP if axis in BATCH)  # devices with other rows
TENSOR = tuple(axis for axis in MLP if axis not in BATCH)  # devices with the same ones


class ParallelExperts:
    """The `experts` operator over a mesh; equal to the one-device operator in values and gradients."""

    def __init__(self, mesh: Mesh, config: ModelConfig, gradient_dtype: GradientDtype = "compute"):
        self.mesh, self.config, self.gradient_dtype = mesh, config, gradient_dtype
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
        """As `models.experts.experts`, on arrays of global shape.

        Raises:
            ShardingError: "sequence" cuts through groups of tokens that share places.
        """
        if self.dispatch == "capacity":
            self._check_groups(x_BTD.shape[1])
        # What goes into shard_map has its gradient added up in its own dtype.
        dtype = x_BTD.dtype if self.gradient_dtype == "compute" else jnp.promote_types(x_BTD.dtype, jnp.float32)
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
        )(x_BTD, expert_BTk, weight_BTk, weights.astype(dtype), mask_BT)

    def _check_groups(self, length: int) -> None:
        group, devices = self.config.capacity_group, self.mesh.shape["sequence"]
        if devices > 1 and length // devices % group:
            raise ShardingError(
                f"model.capacity_group={group} does not divide the {length // devices} tokens of a row that each of "
                f"sequence={devices} devices holds; use a divisor of {length // devices}"
            )

    def _capacity(self, x_BTD, expert_BTk, weight_BTk, weights, mask_BT):
        weights = _gather_embed(weights, x_BTD.dtype)
        # XLA leaves a collective of one device where it is.
        split = math.prod(self.mesh.shape[axis] for axis in EXPERT_TENSOR) > 1

        def compute(x_BECD):
            # [B, E, ...] of these groups and all experts <-> [B * X, E / X, ...] of all groups and these experts.
            x_BECD = jax.lax.all_to_all(x_BECD, EXPERTS, split_axis=1, concat_axis=0, tiled=True)
            if split:  # <-> [B * X * Z, E / X, ...], of which these are the sums over a part of F.
                x_BECD = jax.lax.all_gather(x_BECD, EXPERT_TENSOR, axis=0, tiled=True)
            y_BECD = batched_swiglu(x_BECD, weights)
            if split:
                y_BECD = jax.lax.psum_scatter(y_BECD, EXPERT_TENSOR, scatter_dimension=0, tiled=True)
            return jax.lax.all_to_all(y_BECD, EXPERTS, split_axis=0, concat_axis=1, tiled=True)

        y_BTD, dropped = experts_by_capacity(
            x_BTD,
            expert_BTk,
            jnp.where(mask_BT[..., None], weight_BTk, 0),
            compute,
            mask_BT=mask_BT,
            num_experts=weights.gate_EDF.shape[0] * jax.lax.axis_size(EXPERTS),
            capacity_factor=self.config.capacity_factor,
            capacity_group=self.config.capacity_group,
        )
        return jax.lax.psum(y_BTD, TENSOR), jax.lax.psum(dropped, (*BATCH, *SEQUENCE))

    def _dropless(self, x_BTD, expert_BTk, weight_BTk, weights, mask_BT):
        weights = _gather_embed(weights, x_BTD.dtype)
        weight_BTk = jnp.where(mask_BT[..., None], weight_BTk, 0)
        rows = jax.tree.map(
            lambda x: jax.lax.all_gather(x, (*EXPERTS, *EXPERT_TENSOR), axis=0, tiled=True),
            (x_BTD, expert_BTk, weight_BTk),
        )
        first_expert = jax.lax.axis_index(EXPERTS) * weights.gate_EDF.shape[0]
        y_BTD = dropless_experts(*rows, weights, first_expert=first_expert, dispatch=self.dispatch)
        y_BTD = y_BTD.astype(x_BTD.dtype)
        y_BTD = jax.lax.psum_scatter(y_BTD, (*EXPERTS, *EXPERT_TENSOR), scatter_dimension=0, tiled=True)
        return jax.lax.psum(y_BTD, TENSOR), jnp.zeros((), jnp.float32)


def _is_local(primitive, *_, **__) -> bool:
    """Whether the backward pass may keep what a primitive computed: all but what it gathered from other devices."""
    return primitive.name != "all_gather"


def _gather_embed(weights: ExpertWeights, dtype: jnp.dtype) -> ExpertWeights:
    """The local experts' matrices with their model dim whole, in a dtype; the gradient is reduce-scattered."""
    return ExpertWeights(
        _gather(weights.gate_EDF, 1, dtype), _gather(weights.up_EDF, 1, dtype), _gather(weights.down_EFD, 2, dtype)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
    """The parts along EMBED, sent in `dtype`; those of the gradient are sent in the dtype of the weight."""
    return jax.lax.all_gather(weight.astype(dtype), EMBED, axis=axis, tiled=True)


def _gather_forward(weight, axis, dtype):
    # Not by calling _gather, inside which a policy of rematerialisation sees nothing.
    gathered = jax.lax.all_gather(weight.astype(dtype), EMBED, axis=axis, tiled=True)
    return gathered, jnp.zeros((), weight.dtype)


def _gather_backward(axis, dtype, like, gradient):
    return (jax.lax.psum_scatter(gradient.astype(like.dtype), EMBED, scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)
