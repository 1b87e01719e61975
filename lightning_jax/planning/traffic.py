"""What a device sends in a step, by mesh axes: weights, and what tokens need of each other; and over which wires.

Bytes are those of rings, as in `collectives.py`. Where a group lies on several islands, slices or nodes of GPUs, the
islands receive what is gathered once, in parts over the network ports of all their devices, and hand it on over their
links; sums go the other way. An exchange all to all sends over the network all that is for other islands, and a ring of
single messages goes no faster than the one between two islands.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_jax.models import ModelConfig
from lightning_jax.models.config import BYTES
from lightning_jax.parallel.config import AXES, MeshConfig
from lightning_jax.planning.collectives import SENT
from lightning_jax.planning.hardware import Slice
from lightning_jax.planning.held import DENSE, Held, expert_copies

# The part of what is sent that goes over the network, by devices of a group and islands that they lie on.
NETWORK = {
    "all-gather": lambda devices, islands: (islands - 1) / (devices - 1),
    "all-reduce": lambda devices, islands: (islands - 1) / (devices - 1),
    "reduce-scatter": lambda devices, islands: (islands - 1) / (devices - 1),
    "all-to-all": lambda devices, islands: (devices - devices / islands) / (devices - 1),
    "collective-permute": lambda devices, islands: 1.0 if islands > 1 else 0.0,
}


@dataclass(frozen=True)
class Sent:
    """Bytes that a device sends in a step."""

    total: float
    network: float  # of them, over the network

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.total + other.total, self.network + other.network)


def spread(axes: tuple[str, ...], sizes: Mapping[str, int], islands: int) -> tuple[int, int]:
    """Of a group along mesh axes: its devices, and the islands it lies on; the first axes lie across islands."""
    devices = on = 1
    for axis, size in sizes.items():
        across = math.gcd(size, islands)
        islands //= across
        if axis in axes:
            devices, on = devices * size, on * across
    return devices, on


def divides_slices(sizes: Mapping[str, int], target: Slice) -> bool:
    """Whether the slices divide the axes of a mesh, from the first on, as `parallel.make_mesh` lays it out."""
    return spread(tuple(sizes), sizes, target.num_slices)[1] == target.num_slices


def sent_in_step(
    model: ModelConfig,
    mesh: MeshConfig,
    sizes: Mapping[str, int],
    islands: int,
    held: Held,
    *,
    rows: int,
    tokens: int,
    parts: int,
    forwards: int,
) -> dict[tuple[str, ...], Sent]:
    """What a device sends, by the mesh axes along which it goes.

    Args:
        mesh: for how keys and values travel, and in which dtype gradients are added up.
        sizes: of the mesh axes.
        rows, tokens: of a micro-batch on one device.
        parts: micro-batches.
        forwards: passes over the layers of each of them, besides the backward one.
    """
    width, D = BYTES[model.compute_dtype], model.hidden_size
    added_up = width if mesh.gradient_dtype == "compute" else 4
    sent: dict[tuple[str, ...], Sent] = {}

    def add(kind: str, axes: tuple[str, ...], result: float, times: float) -> None:
        axes = tuple(axis for axis in AXES if axis in axes and sizes[axis] > 1)
        if axes and result and times:
            devices, on = spread(axes, sizes, islands)
            total = times * SENT[kind](result, devices)
            sent[axes] = sent.get(axes, Sent(0.0, 0.0)) + Sent(total, total * NETWORK[kind](devices, on))

    def add_weights(axes: tuple[str, ...], elements: float, trained: float, gathers: int) -> None:
        # The gradient is scattered, and summed over replicas.
        devices = math.prod(sizes[axis] for axis in axes)
        add("all-gather", axes, width * elements, gathers * parts)
        add("reduce-scatter", axes, added_up * trained / devices, parts)
        add("all-reduce", ("data",), added_up * trained / devices, parts)

    for axes, elements in held.gathered.items():
        # Where no pass is made again, the backward one gathers all the same.
        add_weights(axes, elements, held.gathered_trained[axes], max(forwards, 2))
    add_weights(DENSE, held.ends, held.ends_trained, 1 if parts == 1 else 2)
    in_layers = parts * model.num_layers * (forwards + 1)
    places = expert_copies(model) * tokens * D * width
    if model.num_experts and model.expert_dispatch == "capacity":
        add("all-to-all", ("expert",), places, 2 * in_layers)
        add("all-gather", ("expert_tensor",), sizes["expert_tensor"] * places, in_layers)
        add("reduce-scatter", ("expert_tensor",), places, in_layers)
    elif model.num_experts:
        axes = ("expert", "expert_tensor")
        add("all-gather", axes, sizes["expert"] * sizes["expert_tensor"] * tokens * D * width, in_layers)
        add("reduce-scatter", axes, tokens * D * width, in_layers)
    # A sum of the mixer's and of the feed-forward's output in each pass that computes them, and of their gradients.
    add("all-reduce", ("tensor",), tokens * D * width, 2 * in_layers)
    heads, kv_heads = model.num_heads / sizes["tensor"], model.num_kv_heads / sizes["tensor"]
    lightning, softmax = (model.layer_kinds().count(kind) for kind in ("lightning", "softmax"))
    states = rows * heads * model.head_dim**2 * 4
    add("all-gather", ("sequence",), sizes["sequence"] * states, parts * (forwards + 1) * lightning)
    keys_values = 2 * tokens * kv_heads * model.head_dim * width
    if mesh.sequence_attention == "ring":
        turns = sizes["sequence"] - 1
        add("collective-permute", ("sequence",), keys_values, parts * (forwards + 1) * softmax * turns)
    else:
        add("all-gather", ("sequence",), sizes["sequence"] * keys_values, parts * (forwards + 1) * softmax)
    return sent
