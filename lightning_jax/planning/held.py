"""What a device holds of parameters, gradients and moments, counted array by array as the sharding rules split them."""

import functools
import math
from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from lightning_jax import parallel
from lightning_jax.config import RunConfig
from lightning_jax.models import HybridLM, ModelConfig, lora
from lightning_jax.models.config import BYTES, LoraConfig
from lightning_jax.optimizers import OptimizerConfig
from lightning_jax.stages import Stage

DENSE, EXPERTS = (parallel.RULES.mesh_axes(axis) for axis in ("embed", "expert_embed"))


@dataclass(frozen=True)
class Held:
    """Bytes of parameters and moments on one device, and elements by how they are split."""

    weights: int
    trained: int  # of these bytes, all or those of adapters
    moments: int
    gathered: dict[tuple[str, ...], int]  # of layers: elements by the axes that split the model dim, with it whole
    gathered_trained: dict[tuple[str, ...], int]  # of these, what is trained
    ends: int  # of embedding and head, likewise
    ends_trained: int

    @property
    def all_gathered(self) -> int:
        return sum(self.gathered.values()) + self.ends


def held_by_device(config: RunConfig, stage: Stage, mesh: AbstractMesh) -> Held:
    """Of a stage's train state on a mesh.

    Raises:
        ShardingError: the mesh does not divide the model's sizes.
    """
    return _held(config.model, config.lora, stage.config.optimizer, mesh)


def companions_by_device(config: RunConfig, stage: Stage, held: Held, mesh: AbstractMesh) -> int:
    """Bytes of a live reference, of the policy that refills stale rollouts, and of a value model with its training."""
    preference, learning = stage.config.preference, stage.config.reinforcement
    copies = int(preference is not None and preference.reference == "live")
    if not learning:
        return copies * held.trained
    copies += bool(learning.policy_gradient.kl_coefficient)
    rollouts = learning.rollouts
    copies += bool(rollouts.staleness and rollouts.dynamic_sampling and not rollouts.devices)
    value = learning.value
    if not value:
        return copies * held.trained
    own = _held(value.model or config.model, None, value.optimizer, mesh)
    return copies * held.trained + own.weights + own.moments + own.trained


def _held(model: ModelConfig, adapters: LoraConfig | None, optimizer: OptimizerConfig, mesh: AbstractMesh) -> Held:
    abstract = _abstract_params(model, adapters)
    shardings = nnx.to_flat_state(parallel.shardings(abstract, mesh))
    weights = trained = moments = ends = ends_trained = 0
    gathered, gathered_trained = {DENSE: 0, EXPERTS: 0}, {DENSE: 0, EXPERTS: 0}
    moment_bytes = BYTES[optimizer.moment_dtype]
    for (_, leaf), (_, placed) in zip(nnx.to_flat_state(abstract), shardings, strict=True):
        array, sharding = leaf.get_value(), placed.get_value()
        assert isinstance(sharding, NamedSharding)
        share = math.prod(sharding.shard_shape(array.shape))
        logical_axes = leaf.get_metadata("logical_axes")
        split = EXPERTS if "expert_embed" in logical_axes else DENSE
        whole = 0
        if {"embed", "expert_embed"} & set(logical_axes):
            whole = share * math.prod(mesh.shape[axis] for axis in split)
        weights += share * array.dtype.itemsize
        is_end = "vocab" in logical_axes
        if is_end:
            ends += whole
        else:
            gathered[split] += whole
        if not adapters or isinstance(leaf, lora.Adapter):
            trained += share * array.dtype.itemsize
            moments += 2 * share * moment_bytes
            if is_end:
                ends_trained += whole
            else:
                gathered_trained[split] += whole
    return Held(weights, trained, moments, gathered, gathered_trained, ends, ends_trained)


@functools.cache
def _abstract_params(model: ModelConfig, adapters: LoraConfig | None) -> nnx.State:
    def parameters() -> nnx.State:
        language_model = HybridLM(model, rngs=nnx.Rngs(params=0))
        if adapters:
            lora.adapt(language_model, adapters, rngs=nnx.Rngs(params=0))
        return nnx.state(language_model, nnx.Param)

    return jax.eval_shape(parameters)


def expert_copies(model: ModelConfig) -> float:
    """How often the feed-forward computes a token: by each of its experts, and in empty places."""
    if not model.num_experts:
        return 1
    return model.experts_per_token * (model.capacity_factor if model.expert_dispatch == "capacity" else 1)
