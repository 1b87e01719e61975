"""One table from logical axes to mesh axes, and the shardings of parameters, optimizer state and batches that follow.

Source: GSPMD (arXiv 2105.04663); ZeRO (arXiv 1910.02054) for splitting parameters and moments over replicas ("fsdp").
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightning_jax.errors import UserError
from lightning_jax.models.operators import LogicalAxes

HOST_MEMORY = "pinned_host"  # as JAX calls it


class ShardingError(UserError):
    """An array that cannot be split as the rules say."""


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that split each logical axis.

    Attributes:
        table: logical axis -> mesh axes. An axis of an array that is declared None is never split.
    """

    table: Mapping[str, tuple[str, ...]]

    def mesh_axes(self, logical_axis: str | None, name: str = "array") -> tuple[str, ...]:
        """The mesh axes that split a logical axis, none for None."""
        if logical_axis is None:
            return ()
        if logical_axis not in self.table:
            raise ShardingError(f"{name}: no sharding rule for axis {logical_axis!r}; known: {', '.join(self.table)}")
        return self.table[logical_axis]

    def spec(self, logical_axes: LogicalAxes, shape: tuple[int, ...], mesh: Mesh, name: str = "array") -> PartitionSpec:
        """How an array is split.

        Args:
            logical_axes: names of its last axes; axes before them are "layers".
            name: what an error calls the array.

        Raises:
            ShardingError: a size does not divide, or two axes of the array would be split over one mesh axis.
        """
        logical_axes = ("layers",) * (len(shape) - len(logical_axes)) + tuple(logical_axes)
        split = [self.mesh_axes(axis, name) for axis in logical_axes]
        for logical_axis, mesh_axes, size in zip(logical_axes, split, shape, strict=True):
            devices = mesh_size(mesh, mesh_axes)
            if size % devices:
                described = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axes if mesh.shape[axis] > 1)
                raise ShardingError(
                    f"{name}: axis {logical_axis!r} of size {size} does not divide over mesh axes {described}; "
                    f"use a divisor of {size}"
                )
        for mesh_axis, uses in Counter(axis for axes in split for axis in axes).items():
            if uses > 1:
                both = [axis for axis, mesh_axes in zip(logical_axes, split, strict=True) if mesh_axis in mesh_axes]
                raise ShardingError(
                    f"{name}: axes {' and '.join(map(repr, both))} are both split over mesh axis {mesh_axis!r}; "
                    f"declare one of them None"
                )
        return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in split))


RULES = ShardingRules(
    {
        # Activations. Their model dim is declared None: "embed" is for parameters.
        "batch": ("data", "fsdp", "expert", "expert_tensor"),
        "sequence": ("sequence",),
        # Parameters, over all devices but those along "data", gathered layer by layer; experts stay apart.
        "layers": (),
        "embed": ("fsdp", "sequence", "expert", "expert_tensor"),
        "expert_embed": ("fsdp", "sequence"),
        "vocab": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "expert_mlp": ("expert_tensor", "tensor"),
        "experts": ("expert",),
    }
)


def mesh_size(mesh: Mesh, mesh_axes: tuple[str, ...]) -> int:
    """The number of devices along some axes of a mesh together."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes)


def shardings(tree: Any, mesh: Mesh, rules: ShardingRules = RULES) -> Any:
    """A tree like `tree` with the sharding of each leaf: variables by their logical axes, all else on every device.

    Optimizer states keep the variables of the parameters they mirror, and so are split the same way: give the whole
    train state, abstract or not.

    Raises:
        ShardingError: naming the first parameter that cannot be split as the rules say.
    """

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    def sharding(path: tuple, node: Any) -> NamedSharding:
        if not is_variable(node):
            return NamedSharding(mesh, PartitionSpec())
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, rules.spec(node.get_metadata("logical_axes"), node.get_value().shape, mesh, name))

    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
    return jax.tree.unflatten(jax.tree.structure(tree), [sharding(path, node) for path, node in nodes])


def abstract(tree: Any, mesh: Mesh, rules: ShardingRules = RULES) -> Any:
    """Shapes, dtypes and shardings of a tree's arrays, abstract or not. Raises ShardingError as `shardings` does."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh, rules),
    )


def on_host(shardings: Any, shapes: Any, mesh: Mesh) -> Any:
    """The same shardings for arrays in the host's memory; scalars stay on the devices.

    Raises:
        ShardingError: the platform, or this version of JAX on it, has no such memory.
    """
    device = mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}  # none where it is only described
    if kinds and HOST_MEMORY not in kinds:
        raise ShardingError(
            f"mesh.moments: with jax {jax.__version__} {device.device_kind} does not reach its host's memory "
            f"({HOST_MEMORY}), only {', '.join(sorted(kinds))}; use device"
        )

    def place(sharding: NamedSharding, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        return sharding.with_memory_kind(HOST_MEMORY) if shape.ndim else sharding

    return jax.tree.map(place, shardings, shapes)


def batch_sharding(mesh: Mesh, rules: ShardingRules = RULES) -> NamedSharding:
    """The sharding of a batch's arrays [B, T]: rows over the axes of "batch", their tokens over "sequence"."""
    return NamedSharding(mesh, PartitionSpec(rules.mesh_axes("batch"), rules.mesh_axes("sequence")))


def batch_shards(mesh: Mesh, rules: ShardingRules = RULES) -> int:
    """How many parts a batch's rows are split into; it must divide their number."""
    return mesh_size(mesh, rules.mesh_axes("batch"))


class RowsOfHost(NamedTuple):
    """Which part of a batch's rows a host reads: part `index` of `count` equal ones."""

    index: int
    count: int


def rows_of_host(mesh: Mesh, process_index: int) -> RowsOfHost:
    """The rows that the devices of a host work on; hosts among which a row or its heads are split read the same.

    Raises:
        ShardingError: two hosts have some rows in common, and others not.
    """
    by_shard = mesh.devices.reshape(batch_shards(mesh), -1)  # the axes of rows come first
    shards: dict[int, set[int]] = {}
    for shard, devices in enumerate(by_shard):
        for device in devices:
            shards.setdefault(device.process_index, set()).add(shard)
    parts = sorted({tuple(sorted(each)) for each in shards.values()})
    if sum(map(len, parts)) > len(by_shard) or len({len(part) for part in parts}) > 1:
        raise ShardingError(
            "mesh: hosts share some rows of a batch and not others; let the devices of a host divide data x fsdp x "
            "expert x expert_tensor, or be divided by sequence x tensor"
        )
    return RowsOfHost(parts.index(tuple(sorted(shards[process_index]))), len(parts))


def constrain(x: jax.Array, logical_axes: LogicalAxes, mesh: Mesh, rules: ShardingRules = RULES) -> jax.Array:
    """Places an activation as the rules say, inside jit."""
    spec = rules.spec(logical_axes, x.shape, mesh, "activation")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
