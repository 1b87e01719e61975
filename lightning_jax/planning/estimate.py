"""What a step of a run takes on a slice, from the model's own arithmetic: no compiler, a second or two.

Weights, gradients and moments are counted array by array as the sharding rules split them, and so exact. Activations
are counted from what the backward pass keeps: of every layer its input (remat="full", and "offload" on the host, but
for those on their way) or all it computed; of the layer at work everything; of the loss three buffers of a chunk's
logits.

Work and traffic are sums over one step on one device: products by `ModelConfig.flops_per_token` and once more the
forward pass where it is rematerialised; collectives by mesh axis, in bytes that a device sends, as rings send them.

Shapes: t tokens of a micro-batch on one device, D model dim, A attention width, F feed-forward dim, V vocabulary.
"""

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
from lightning_jax.parallel.config import AXES
from lightning_jax.planning.hardware import Slice
from lightning_jax.stages import Stage, num_micro_batches

# A part of the memory that no plan should count on: the runtime's own, and what fragments.
RESERVE = 0.08

DENSE, EXPERTS = (parallel.RULES.mesh_axes(axis) for axis in ("embed", "expert_embed"))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind."""

    weights: int
    moments: int
    gradients: int
    batch: int
    activations: float  # kept from the forward pass for the backward pass
    temporaries: float  # of the layer at work or of the loss, whichever is more
    on_host: float = 0  # activations that the host keeps; not in the total

    @property
    def arguments(self) -> int:
        """What is there between steps."""
        return self.weights + self.moments + self.batch

    @property
    def total(self) -> float:
        return self.arguments + self.gradients + self.activations + self.temporaries


@dataclass(frozen=True)
class Estimate:
    """One step of a stage at its largest batch; all but `tokens` of one device."""

    target: Slice
    mesh: dict[str, int]
    tokens: int  # of the global batch
    micro_batches: int
    memory: Memory
    model_flops: float  # as MFU counts them
    flops: float  # with what is computed twice
    memory_traffic: float  # bytes
    sent: dict[tuple[str, ...], float]  # bytes by the mesh axes along which they go

    @property
    def seconds(self) -> dict[str, float]:
        """The least time of each resource, if nothing else held it up."""
        chip = self.target.chip
        return {
            "compute": self.flops / chip.bf16_flops,
            "memory": self.memory_traffic / chip.memory_bandwidth,
            "links": sum(sent / self.target.bandwidth(self._span(axes)) for axes, sent in self.sent.items()),
        }

    @property
    def fits(self) -> bool:
        """Whether a device can hold it."""
        return self.memory.total <= (1 - RESERVE) * self.target.chip.memory_bytes

    def _span(self, axes: tuple[str, ...]) -> int:
        """Among how many neighbouring devices a group along these axes lies."""
        sizes = list(self.mesh.values())
        return math.prod(sizes[list(self.mesh).index(axes[0]) :])

    @property
    def bound(self) -> tuple[str, float]:
        """The resource that binds, and its seconds: the roofline."""
        return max(self.seconds.items(), key=lambda item: item[1])

    def seconds_at(self, mfu: float) -> float:
        """The time of a step at this MFU."""
        return self.model_flops / (self.target.chip.bf16_flops * mfu)


def estimate(config: RunConfig, stage: Stage, target: Slice) -> Estimate:
    """The estimate of a stage's step at its largest batch.

    Raises:
        MeshError, ShardingError: the config's mesh does not fit the slice, or its sizes the mesh.
    """
    model = config.model
    sizes = config.resolved_mesh(target.num_devices)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    rows = stage.most_rows
    shards = parallel.batch_shards(mesh)
    parts = num_micro_batches(stage.config, rows, shards)
    context = stage.config.context_length
    device_rows = rows // parts // shards
    device_tokens = device_rows * context // sizes["sequence"]
    held = _held(config, stage, mesh)
    memory = Memory(
        weights=held.weights,
        moments=held.moments,
        # Micro-batches add to a sum, and so have two.
        gradients=held.trained * (1 if parts == 1 else 2),
        batch=17 * device_tokens * parts,  # four arrays of int32 and a mask
        activations=_kept_elements(model, sizes["tensor"]) * device_tokens * BYTES[model.compute_dtype],
        temporaries=max(
            _layer_elements(model, sizes, held, device_rows, context) * BYTES[model.compute_dtype],
            _loss_bytes(model, sizes["tensor"], device_rows, min(model.loss_chunk, context // sizes["sequence"])),
        ),
        on_host=_offloaded_elements(model) * device_tokens * BYTES[model.compute_dtype],
    )
    tokens = rows * context
    model_flops = model.flops_per_token(context, "model") * tokens / target.num_devices
    passes = 3 if model.remat == "none" else 4  # forward, twice its work backward, and the forward again
    frozen_passes = 1 if config.lora else 0  # a backward pass takes no gradient of what is frozen
    return Estimate(
        target=target,
        mesh=sizes,
        tokens=tokens,
        micro_batches=parts,
        memory=memory,
        model_flops=model_flops,
        flops=model_flops * (passes - frozen_passes) / 3,
        memory_traffic=_memory_traffic(model, memory, sizes, held, device_tokens, parts, passes),
        sent=_sent(model, sizes, held, device_rows, device_tokens, parts, passes),
    )


@dataclass(frozen=True)
class Held:
    """Bytes of parameters and moments on one device, and elements by how they are split."""

    weights: int
    trained: int  # of these bytes, all or those of adapters
    moments: int
    gathered: dict[tuple[str, ...], int]  # elements by the axes that split the model dim, with it whole
    gathered_trained: dict[tuple[str, ...], int]  # of these, what is trained

    @property
    def all_gathered(self) -> int:
        return sum(self.gathered.values())


@functools.cache
def _abstract_params(model: ModelConfig, adapters: LoraConfig | None) -> nnx.State:
    def parameters() -> nnx.State:
        language_model = HybridLM(model, rngs=nnx.Rngs(params=0))
        if adapters:
            lora.adapt(language_model, adapters, rngs=nnx.Rngs(params=0))
        return nnx.state(language_model, nnx.Param)

    return jax.eval_shape(parameters)


def _held(config: RunConfig, stage: Stage, mesh: AbstractMesh) -> Held:
    abstract = _abstract_params(config.model, config.lora)
    shardings = nnx.to_flat_state(parallel.shardings(abstract, mesh))
    weights = trained = moments = 0
    gathered, gathered_trained = {DENSE: 0, EXPERTS: 0}, {DENSE: 0, EXPERTS: 0}
    moment_bytes = BYTES[stage.config.optimizer.moment_dtype]
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
        gathered[split] += whole
        if not config.lora or isinstance(leaf, lora.Adapter):
            trained += share * array.dtype.itemsize
            moments += 2 * share * moment_bytes
            gathered_trained[split] += whole
    return Held(weights, trained, moments, gathered, gathered_trained)


def _kept_elements(model: ModelConfig, tensor: int) -> float:
    """Elements per token that the forward pass leaves to the backward pass."""
    if model.remat == "full":
        return (model.num_layers + 2) * model.hidden_size
    if model.remat == "offload":
        return 4 * model.hidden_size
    share = 1.0 if model.remat == "none" else 0.5  # "dots" keeps the products of weights
    layers = sum(_layer_elements_per_token(model, kind, tensor) for kind in model.layer_kinds())
    return share * layers + 2 * model.hidden_size


def _offloaded_elements(model: ModelConfig) -> int:
    """Elements per token that wait on the host for the backward pass."""
    return model.num_layers * model.hidden_size if model.remat == "offload" else 0


def _layer_elements_per_token(model: ModelConfig, kind: str, tensor: int) -> float:
    """Elements per token that one layer computes, forward; the multiples are fitted to what XLA allocates."""
    D, A, F = model.hidden_size, model.num_heads * model.head_dim / tensor, model.intermediate_size / tensor
    kv = model.num_kv_heads * model.head_dim / tensor
    mixer = 8 * A if kind == "lightning" else 3 * A + 4 * kv
    return mixer + 4.5 * D + _copies(model) * ((5 if model.num_experts else 3) * F + 2 * D)


def _copies(model: ModelConfig) -> float:
    """How often the feed-forward computes a token: by each of its experts, and in empty places."""
    if not model.num_experts:
        return 1
    return model.experts_per_token * (model.capacity_factor if model.expert_dispatch == "capacity" else 1)


def _layer_elements(model: ModelConfig, sizes: dict[str, int], held: Held, rows: int, context: int) -> float:
    """Elements that the layer at work holds in its backward pass: its own, its weights gathered and their gradient."""
    tokens = rows * context / sizes["sequence"]
    per_token = max(_layer_elements_per_token(model, kind, sizes["tensor"]) for kind in set(model.layer_kinds()))
    if model.num_experts and model.expert_dispatch != "capacity":
        # The tokens of all devices along "expert" come to each of them.
        per_token += (sizes["expert"] - 1) * (_copies(model) * (3 * model.intermediate_size / sizes["tensor"]))
    ends = 2 * model.vocab_size * model.hidden_size / sizes["tensor"]
    weights = (held.all_gathered - ends) / model.num_layers
    return 2 * per_token * tokens + 2 * weights


def _loss_bytes(model: ModelConfig, tensor: int, rows: int, chunk: int) -> float:
    """Three buffers of a chunk's logits, and the head: whole along the model dim, and its gradient, in fp32."""
    return 3 * 4 * rows * chunk * model.vocab_size / tensor + 2 * 4 * model.vocab_size * model.hidden_size / tensor


def _memory_traffic(
    model: ModelConfig, memory: Memory, sizes: dict[str, int], held: Held, tokens: int, parts: int, passes: int
) -> float:
    """Bytes a step reads and writes: weights once a pass, each layer's activations twice a pass, all the state."""
    width = BYTES[model.compute_dtype]
    layers = sum(_layer_elements_per_token(model, kind, sizes["tensor"]) for kind in model.layer_kinds())
    state = 2 * (memory.weights + memory.moments) + 2 * memory.gradients
    return parts * passes * width * (held.all_gathered + 2 * layers * tokens) + state


def _sent(
    model: ModelConfig, sizes: dict[str, int], held: Held, rows: int, tokens: int, parts: int, passes: int
) -> dict[tuple[str, ...], float]:
    """Bytes that a device sends in a step, by mesh axes: weights, then what tokens need of each other."""
    width, D = BYTES[model.compute_dtype], model.hidden_size
    sent: dict[tuple[str, ...], float] = {}

    def add(axes: tuple[str, ...], size: float) -> None:
        axes = tuple(axis for axis in AXES if axis in axes and sizes[axis] > 1)
        if axes and size:
            sent[axes] = sent.get(axes, 0.0) + size

    for axes, elements in held.gathered.items():
        # Gathered in the forward pass and again in the backward pass; the gradient scattered, and summed over replicas.
        devices, trained = math.prod(sizes[axis] for axis in axes), held.gathered_trained[axes]
        add(axes, parts * width * (2 * elements + trained) * (devices - 1) / devices)
        add(("data",), parts * _all_reduce(width * trained / devices, sizes["data"]))
    expert, expert_tensor, sequence, tensor = (sizes[axis] for axis in AXES[2:])
    layers = model.num_layers
    if model.num_experts:
        if model.expert_dispatch == "capacity":
            places = _copies(model) * tokens * D * width
            each_way = {("expert",): places * (expert - 1) / expert, ("expert_tensor",): places * (expert_tensor - 1)}
        else:
            each_way = {("expert", "expert_tensor"): tokens * D * width * (expert * expert_tensor - 1)}
        for axes, size in each_way.items():
            add(axes, parts * layers * 2 * (passes - 1) * size)
    # A sum of the mixer's and of the feed-forward's output in each pass that computes them, and of their gradients.
    add(("tensor",), parts * layers * 2 * (passes - 1) * _all_reduce(tokens * D * width, tensor))
    heads, kv_heads = model.num_heads / tensor, model.num_kv_heads / tensor
    kinds = model.layer_kinds()
    states = rows * heads * model.head_dim**2 * 4 * (sequence - 1)
    keys_values = 2 * tokens * kv_heads * model.head_dim * width * (sequence - 1)
    add(
        ("sequence",),
        parts * (passes - 1) * (kinds.count("lightning") * states + kinds.count("softmax") * keys_values),
    )
    return sent


def _all_reduce(size: float, devices: int) -> float:
    return 2 * size * (devices - 1) / devices
