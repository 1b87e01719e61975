"""What a mesh changes in how a model computes: its operators.

Attention never looks across rows or heads, so each device runs it on its own rows and heads. `shard_map` says so: the
compiler cannot know it of a kernel, nor of a loop whose length depends on the documents. Where "sequence" splits the
rows themselves, lightning layers gather a state from each device (LASP-2, arXiv 2502.07563; MiniMax-01 calls it LASP+),
and softmax layers send keys and values.

Shapes: B batch, T sequence, H query heads, G key/value heads, K head dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lightning_jax.models.config import ModelConfig
from lightning_jax.models.operators import Operators, complete, project
from lightning_jax.parallel.config import GradientDtype, SequenceAttention
from lightning_jax.parallel.expert import ParallelExperts
from lightning_jax.parallel.sequence import sequence_parallel_softmax_attention
from lightning_jax.parallel.sharding import RULES, ShardingError, constrain, mesh_size
from pallas_kernels import sequence_parallel_lightning_attention

BATCH = RULES.mesh_axes("batch")
HEADS = RULES.mesh_axes("heads")
SEQUENCE = RULES.mesh_axes("sequence")
ROWS = PartitionSpec(BATCH)
ROWS_AND_HEADS = PartitionSpec(BATCH, None, HEADS)
TOKENS = PartitionSpec(BATCH, SEQUENCE)
TOKENS_AND_HEADS = PartitionSpec(BATCH, SEQUENCE, HEADS)
STATE = PartitionSpec(BATCH, HEADS)
CACHE = PartitionSpec(None, BATCH, HEADS)


# Cached, because modules compare their operators by identity: equal configs must get equal modules, or jit recompiles.
@functools.cache
def operators(
    mesh: Mesh,
    config: ModelConfig,
    sequence_attention: SequenceAttention = "ring",
    gradient_dtype: GradientDtype = "compute",
) -> Operators:
    """The operators that compute a model on this mesh; those of one device are the model's own.

    Args:
        sequence_attention: how keys and values travel where the mesh splits the sequence.
        gradient_dtype: in which devices add up their parts of the gradients of weights.

    Raises:
        ShardingError: the mesh axis "tensor" does not divide the model's heads.
    """
    if mesh.size == 1:
        return Operators()
    heads = {"num_heads": config.num_heads}
    if "softmax" in config.layer_pattern:
        heads["num_kv_heads"] = config.num_kv_heads
    for name, count in heads.items():
        if count % mesh.shape["tensor"]:
            raise ShardingError(
                f"model.{name}={count} does not divide over mesh axis tensor={mesh.shape['tensor']}; "
                f"use a divisor of {count}"
            )
    sequence = mesh.shape["sequence"]
    local = complete(Operators(), config)
    if sequence > 1:
        local_lightning = functools.partial(
            sequence_parallel_lightning_attention,
            axis_name=SEQUENCE[0],
            implementation=config.lightning_implementation,
        )
        local_softmax = functools.partial(
            sequence_parallel_softmax_attention, axis_name=SEQUENCE[0], method=sequence_attention
        )
    else:
        local_lightning, local_softmax = local.lightning_attention, local.softmax_attention

    def lightning_attention(q_BTHK, k_BTHK, v_BTHK, log_decay_H, *, segment_ids):
        def on_device(q_BTHK, k_BTHK, v_BTHK, log_decay_H, segment_ids):
            return local_lightning(q_BTHK, k_BTHK, v_BTHK, log_decay_H, segment_ids=segment_ids)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(TOKENS_AND_HEADS, TOKENS_AND_HEADS, TOKENS_AND_HEADS, PartitionSpec(HEADS), TOKENS),
            out_specs=TOKENS_AND_HEADS,
            check_vma=False,
        )(q_BTHK, k_BTHK, v_BTHK, log_decay_H, segment_ids)

    def softmax_attention(q_BTHK, k_BTGK, v_BTGK, *, segment_ids_BT):
        def on_device(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT):
            return local_softmax(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT=segment_ids_BT)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(TOKENS_AND_HEADS, TOKENS_AND_HEADS, TOKENS_AND_HEADS, TOKENS),
            out_specs=TOKENS_AND_HEADS,
            check_vma=False,
        )(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)

    def lightning_attention_from(q_BTHK, k_BTHK, v_BTHK, log_decay_H, state_BHKK):
        return jax.shard_map(
            local.lightning_attention_from,
            mesh=mesh,
            in_specs=(ROWS_AND_HEADS, ROWS_AND_HEADS, ROWS_AND_HEADS, PartitionSpec(HEADS), STATE),
            out_specs=(ROWS_AND_HEADS, STATE),
            check_vma=False,
        )(q_BTHK, k_BTHK, v_BTHK, log_decay_H, state_BHKK)

    def cached_softmax_attention(q_BTHK, k_BTGK, v_BTGK, cache, layer, positions_BT):
        return jax.shard_map(
            local.cached_softmax_attention,
            mesh=mesh,
            in_specs=(ROWS_AND_HEADS, ROWS_AND_HEADS, ROWS_AND_HEADS, CACHE, PartitionSpec(), ROWS),
            out_specs=(ROWS_AND_HEADS, CACHE),
            check_vma=False,
        )(q_BTHK, k_BTGK, v_BTGK, cache, layer, positions_BT)

    # Left to the compiler, a loop over chunks of the sequence gathers the weights and adds up their gradient over all
    # devices in every turn. Where there is nothing to add up along the axes it is told of, XLA refuses to.
    def sum_over_rows(function, weights_DV, *rows):
        weights_DV = constrain(weights_DV, (None, "vocab"), mesh)
        if mesh_size(mesh, (*BATCH, *SEQUENCE)) == 1:
            return function(weights_DV, *rows)
        return jax.shard_map(
            lambda weights_DV, *rows: jax.lax.psum(function(weights_DV, *rows), (*BATCH, *SEQUENCE)),
            mesh=mesh,
            in_specs=(PartitionSpec(), *(TOKENS for _ in rows)),
            out_specs=PartitionSpec(),
            axis_names={*BATCH, *SEQUENCE},  # the compiler splits the vocabulary
            check_vma=False,
        )(weights_DV, *rows)

    def map_rows(function, weights_DV, *rows):
        weights_DV = constrain(weights_DV, (None, "vocab"), mesh)
        if mesh_size(mesh, BATCH) == 1:
            return function(weights_DV, *rows)
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(PartitionSpec(), *(ROWS for _ in rows)),
            out_specs=ROWS,
            axis_names=set(BATCH),  # the compiler splits the vocabulary
            check_vma=False,
        )(weights_DV, *rows)

    return Operators(
        lightning_attention=lightning_attention,
        softmax_attention=softmax_attention,
        lightning_attention_from=lightning_attention_from,
        cached_softmax_attention=cached_softmax_attention,
        experts=ParallelExperts(mesh, config, gradient_dtype),
        project=_projection(config, sequence, gradient_dtype),
        sum_over_rows=sum_over_rows,
        map_rows=map_rows,
        constrain=functools.partial(constrain, mesh=mesh),
    )


def _projection(
    config: ModelConfig, sequence: int, gradient_dtype: GradientDtype
) -> Callable[[jax.Array, nnx.Param], jax.Array]:
    if gradient_dtype == "float32" and config.compute_dtype != "float32":
        return lambda x_BTD, weight: _product(x_BTD, weight[...])
    return project if sequence == 1 else _project_unflattened


def _project_unflattened(x_BTD: jax.Array, weight: nnx.Param) -> jax.Array:
    """x @ weight where both rows and their tokens are split: flattened, the tokens would have to be gathered."""
    return jnp.einsum("btd,da->bta", x_BTD, weight[...].astype(x_BTD.dtype))


@jax.custom_vjp
def _product(x_BTD: jax.Array, weight_DA: jax.Array) -> jax.Array:
    """x @ weight in the dtype of x, whose gradient of the weight is float32 from the product on.

    A device has the sum over its own tokens, and the compiler adds up those of all devices in the dtype of the product.
    """
    return jnp.einsum("btd,da->bta", x_BTD, weight_DA.astype(x_BTD.dtype))


def _product_forward(x_BTD, weight_DA):
    # Not by calling _product, inside which a policy of rematerialisation sees nothing.
    return jnp.einsum("btd,da->bta", x_BTD, weight_DA.astype(x_BTD.dtype)), (x_BTD, weight_DA)


def _product_backward(residuals, dy_BTA):
    x_BTD, weight_DA = residuals
    dx_BTD = jnp.einsum("bta,da->btd", dy_BTA, weight_DA.astype(x_BTD.dtype))
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    dweight_DA = jnp.einsum("btd,bta->da", x_BTD, dy_BTA, preferred_element_type=wide)
    return dx_BTD, dweight_DA.astype(weight_DA.dtype)


_product.defvjp(_product_forward, _product_backward)
