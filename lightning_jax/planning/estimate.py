"""What a step of a run takes on a slice, from the model's own arithmetic: no compiler, a second or two.

Work and traffic are sums over one step on one device: products by `ModelConfig.flops_per_token`, and the forward passes
that are made again; memory and collectives as `memory.py` and `traffic.py` count them. Of several micro-batches each is
computed forward for its sums, and again when the loss of all is known; layers are once more where `remat` says so. The
head's products are made once with those of its gradient.
"""

import math
from dataclasses import dataclass

from jax.sharding import AbstractMesh

from lightning_jax import parallel
from lightning_jax.config import RunConfig
from lightning_jax.models import ModelConfig
from lightning_jax.models.config import BYTES
from lightning_jax.planning.hardware import Slice
from lightning_jax.planning.held import Held, companions_by_device, held_by_device
from lightning_jax.planning.memory import Memory, layer_elements_per_token, memory_of_step
from lightning_jax.planning.rollouts import Rollouts, rollouts_of
from lightning_jax.planning.traffic import Sent, sent_in_step
from lightning_jax.stages import Stage, num_micro_batches

# A part of the memory that no plan should count on: the runtime's own, and what fragments.
RESERVE = 0.08


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
    sent: dict[tuple[str, ...], Sent]  # by the mesh axes along which it goes
    rollouts: Rollouts | None = None  # of a stage of reinforcement learning

    @property
    def seconds(self) -> dict[str, float]:
        """The least time of each resource, if nothing else held it up."""
        chip = self.target.chip
        network = sum(sent.network for sent in self.sent.values())
        seconds = {
            "compute": self.flops / chip.bf16_flops,
            "memory": self.memory_traffic / chip.memory_bandwidth,
            "links": (sum(sent.total for sent in self.sent.values()) - network) / chip.link_bandwidth,
        }
        return seconds | ({"network": network / chip.network_bandwidth} if self.target.num_islands > 1 else {})

    @property
    def communication_seconds(self) -> float:
        """The least time of all collectives, links and network one after the other."""
        return self.seconds["links"] + self.seconds.get("network", 0.0)

    @property
    def fits(self) -> bool:
        """Whether a device can hold it."""
        return self.memory.total <= (1 - RESERVE) * self.target.chip.memory_bytes

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
    held = held_by_device(config, stage, mesh)
    memory = memory_of_step(
        model,
        config.mesh,
        sizes,
        held,
        companions_by_device(config, stage, held, mesh),
        rows=device_rows,
        context=context,
        parts=parts,
        copies_slices=target.chip.platform != "cpu",
    )
    tokens = rows * context
    num_training = math.prod(sizes.values())
    model_flops = model.flops_per_token(context, "model") * tokens / num_training
    forwards = 1 if parts == 1 else 2
    again = model.remat in ("full", "offload") or (model.remat == "dots" and model.num_experts > 0)  # keeps no experts'
    layer_forwards = forwards + again
    backward = 1 if config.lora else 2  # times the work of a forward pass; it takes no gradient of what is frozen
    head_flops = 2 * model.vocab_size * model.hidden_size * tokens / num_training
    layer_flops = model_flops / 3 - head_flops
    # A dense feed-forward's last product is not made again: no gradient needs what it gives.
    spared = 0 if model.num_experts or not again else 2 * model.hidden_size * model.intermediate_size * model.num_layers
    return Estimate(
        target=target,
        mesh=sizes,
        tokens=tokens,
        micro_batches=parts,
        memory=memory,
        model_flops=model_flops,
        flops=layer_flops * (layer_forwards + backward)
        + head_flops * (forwards + backward)
        - spared * tokens / num_training,
        memory_traffic=_memory_traffic(model, memory, sizes["tensor"], held, device_tokens, parts, layer_forwards + 2),
        sent=sent_in_step(
            model,
            config.mesh,
            sizes,
            target.num_islands,
            held,
            rows=device_rows,
            tokens=device_tokens,
            parts=parts,
            forwards=layer_forwards,
        ),
        rollouts=rollouts_of(config, stage, target.chip, sizes, memory.arguments)
        if stage.config.reinforcement
        else None,
    )


def _memory_traffic(
    model: ModelConfig, memory: Memory, tensor: int, held: Held, tokens: int, parts: int, passes: int
) -> float:
    """Bytes a step reads and writes: weights once a pass, each layer's activations twice a pass, all the state."""
    layers = sum(layer_elements_per_token(model, kind, tensor) for kind in model.layer_kinds())
    state = 2 * (memory.weights + memory.moments) + 2 * memory.gradients
    return parts * passes * BYTES[model.compute_dtype] * (held.all_gathered + 2 * layers * tokens) + state
