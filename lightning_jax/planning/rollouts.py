"""What making rollouts takes of a device: weights, the states of sequences under way, and the least time of a token.

Each token of every sequence reads the weights once. A mesh that splits them along the model dim, as training does,
gathers them for every token too, unlike one that splits heads and experts alone: what a share of the devices is for.
"""

import math
from dataclasses import dataclass

from jax.sharding import AbstractMesh

from lightning_jax import parallel
from lightning_jax.config import RunConfig
from lightning_jax.models.config import BYTES
from lightning_jax.models.stateful_attention import places
from lightning_jax.planning.hardware import Chip
from lightning_jax.planning.held import held_by_device
from lightning_jax.stages import Stage


@dataclass(frozen=True)
class Rollouts:
    """Of a stage's rollouts on one of the devices that make them."""

    num_devices: int
    mesh: dict[str, int]
    alone: bool  # these devices do not train
    weights: int  # bytes; with others' beside them where the devices train
    states: float  # bytes
    token_seconds: float  # at least, of one token of every sequence

    @property
    def total(self) -> float:
        return self.weights + self.states


def rollouts_of(config: RunConfig, stage: Stage, chip: Chip, training: dict[str, int], resident: int) -> Rollouts:
    """The rollouts of a stage of reinforcement learning.

    Args:
        training: the mesh that trains, by axis.
        resident: bytes that a device which trains keeps between steps.

    Raises:
        ShardingError: the mesh does not divide the model's sizes.
    """
    model, share = config.model, config.rollout_mesh
    sizes = share.sizes() if share else training | {"fsdp": training["fsdp"] * training["sequence"], "sequence": 1}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    held = held_by_device(config, stage, mesh)
    width = BYTES[model.compute_dtype]
    slots = stage.config.reinforcement.rollouts.slots / parallel.batch_shards(mesh) + 1  # and a prompt on its way
    cache = places(stage.config.context_length + 1) * model.kv_cache_bytes_per_token()
    states = slots * (model.state_bytes_per_sequence() + cache) / sizes["tensor"]
    received = 0.0
    for axes, elements in held.gathered.items():
        devices = math.prod(sizes[axis] for axis in axes)
        received += width * elements * (devices - 1) / devices
    read = width * held.all_gathered + states
    return Rollouts(
        num_devices=math.prod(sizes.values()),
        mesh=sizes,
        alone=share is not None,
        weights=held.weights if share else resident,
        states=states,
        token_seconds=max(received / chip.link_bandwidth, read / chip.memory_bandwidth),
    )
