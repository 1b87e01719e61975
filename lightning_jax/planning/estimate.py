"""What a step of a run takes on a slice, from the model's own arithmetic: no compiler, a second or two.

Weights, gradients and moments are counted array by array as the sharding rules split them, and so exact. Activations
are counted from what the backward pass keeps: of every layer its input (remat="full") or all it computed; of the layer
at work everything; of the loss three buffers of a chunk's logits.

Work and traffic are sums over one step on one device: products by `ModelConfig.flops_per_token` and once more the
forward pass where it is rematerialised; collectives by mesh axis, in bytes that a device sends, as rings send them.

Shapes: t tokens of a micro-batch on one device, D model dim, A attention width, F feed-forward dim, V vocabulary.
"""

import math
from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from lightning_jax import parallel
from lightning_jax.config import RunConfig
from lightning_jax.models import HybridLM, ModelConfig, lora
from lightning_jax.models.config import BYTES
from lightning_jax.parallel.config import AXES
from lightning_jax.planning.hardware import Slice
from lightning_jax.stages import Stage, num_micro_batches


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind."""

    weights: int
    moments: int
    gradients: int
    batch: int
    activations: float  # kept from the forward pass for the backward pass
    temporaries: float  # of the layer at work or of the loss, whichever is more

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
    sent: dict[str, float]  # bytes by mesh axis

    @property
    def seconds(self) -> dict[str, float]:
        """The least time of each resource, if nothing else held it up."""
        chip = self.target.chip
        return {
            "compute": self.flops / chip.bf16_flops,
            "memory": self.memory_traffic / chip.memory_bandwidth,
            "links": sum(self.sent.values()) / chip.link_bandwidth,
        }

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
    sizes = config.resolved_mesh(target.num_chips)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    rows = stage.batch_sizes.rows(stage.batch_sizes.num_steps - 1)
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
            _layer_elements(model, sizes, device_rows, context) * BYTES[model.compute_dtype],
            _loss_bytes(model, sizes["tensor"], device_rows, min(model.loss_chunk, context // sizes["sequence"])),
        ),
    )
    tokens = rows * context
    model_flops = model.flops_per_token(context, "model") * tokens / target.num_chips
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
    gathered: int  # elements of what "fsdp" splits, with it whole, other splits as they are
    gathered_trained: int  # of these, what is trained
    experts: int  # of what is trained of these, experts


def _held(config: RunConfig, stage: Stage, mesh: AbstractMesh) -> Held:
    def parameters() -> nnx.State:
        language_model = HybridLM(config.model, rngs=nnx.Rngs(params=0))
        if config.lora:
            lora.adapt(language_model, config.lora, rngs=nnx.Rngs(params=0))
        return nnx.state(language_model, nnx.Param)

    abstract = jax.eval_shape(parameters)
    shardings = nnx.to_flat_state(parallel.shardings(abstract, mesh))
    weights = trained = moments = gathered = gathered_trained = experts = 0
    moment_bytes = BYTES[stage.config.optimizer.moment_dtype]
    for (_, leaf), (_, placed) in zip(nnx.to_flat_state(abstract), shardings, strict=True):
        array, sharding = leaf.get_value(), placed.get_value()
        assert isinstance(sharding, NamedSharding)
        share = math.prod(sharding.shard_shape(array.shape))
        axes, is_trained = leaf.get_metadata("logical_axes"), not config.lora or isinstance(leaf, lora.Adapter)
        whole = share * mesh.shape["fsdp"] if "embed" in axes else 0
        weights += share * array.dtype.itemsize
        gathered += whole
        if is_trained:
            trained += share * array.dtype.itemsize
            moments += 2 * share * moment_bytes
            gathered_trained += whole
            experts += whole if "experts" in axes else 0
    return Held(weights, trained, moments, gathered, gathered_trained, experts)


def _kept_elements(model: ModelConfig, tensor: int) -> float:
    """Elements per token that the forward pass leaves to the backward pass."""
    if model.remat == "full":
        return (model.num_layers + 2) * model.hidden_size
    share = 1.0 if model.remat == "none" else 0.5  # "dots" keeps the products of weights
    layers = sum(_layer_elements_per_token(model, kind, tensor) for kind in model.layer_kinds())
    return share * layers + 2 * model.hidden_size


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


def _layer_elements(model: ModelConfig, sizes: dict[str, int], rows: int, context: int) -> float:
    """Elements that the layer at work holds in its backward pass."""
    tokens = rows * context / sizes["sequence"]
    per_token = max(_layer_elements_per_token(model, kind, sizes["tensor"]) for kind in set(model.layer_kinds()))
    if model.num_experts and model.expert_dispatch != "capacity":
        # The tokens of all devices along "expert" come to each of them.
        per_token += (sizes["expert"] - 1) * (_copies(model) * (3 * model.intermediate_size / sizes["tensor"]))
    return 2 * per_token * tokens


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
    return parts * passes * width * (held.gathered + 2 * layers * tokens) + state


def _sent(
    model: ModelConfig, sizes: dict[str, int], held: Held, rows: int, tokens: int, parts: int, passes: int
) -> dict[str, float]:
    """Bytes that a device sends in a step, by mesh axis."""
    width, D = BYTES[model.compute_dtype], model.hidden_size
    data, fsdp, expert, sequence, tensor = (sizes[axis] for axis in AXES)
    others = held.gathered_trained - held.experts
    weight_width = BYTES[model.param_dtype]
    sent = dict.fromkeys(AXES, 0.0)
    # Gathered in the forward pass and again in the backward pass; the gradient scattered.
    sent["fsdp"] = parts * width * (2 * held.gathered + held.gathered_trained) * (fsdp - 1) / fsdp
    # What is left of gradients adds up over replicas: all but experts also over "expert".
    sent["data"] = _all_reduce(held.gathered_trained / fsdp * weight_width, data)
    sent["expert"] = parts * _all_reduce(others / fsdp * weight_width, expert)
    sent["sequence"] = parts * _all_reduce(held.gathered_trained / fsdp * weight_width, sequence)
    layers = model.num_layers
    if model.num_experts:
        if model.expert_dispatch == "capacity":
            each_way = _copies(model) * tokens * D * width * (expert - 1) / expert
        else:
            each_way = tokens * D * width * (expert - 1)
        sent["expert"] += parts * layers * 2 * (passes - 1) * each_way
    # A sum of the mixer's and of the feed-forward's output in each pass that computes them, and of their gradients.
    sent["tensor"] = parts * layers * 2 * (passes - 1) * _all_reduce(tokens * D * width, tensor)
    heads, kv_heads = model.num_heads / tensor, model.num_kv_heads / tensor
    kinds = model.layer_kinds()
    states = rows * heads * model.head_dim**2 * 4 * (sequence - 1)
    keys_values = 2 * tokens * kv_heads * model.head_dim * width * (sequence - 1)
    sent["sequence"] += (
        parts * (passes - 1) * (kinds.count("lightning") * states + kinds.count("softmax") * keys_values)
    )
    return sent


def _all_reduce(size: float, devices: int) -> float:
    return 2 * size * (devices - 1) / devices
