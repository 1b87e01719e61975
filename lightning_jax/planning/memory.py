"""Bytes on a device in a step, by kind, from the model's own arithmetic.

What is there between steps is counted array by array, and so exact. Activations are counted from what the backward pass
keeps: of every layer its input (remat="full", and "offload" on the host, but for those on their way) or all it
computed; of the layer at work everything; of the loss three buffers of a chunk's logits. XLA holds more while layers
are gone through backward: the head's gradient, whole, which comes first and is scattered last; and where the pattern of
layers repeats, slices of one repeat out of the stacks: its weights, their gradients, its layers' inputs. CPUs read
these in place.

Shapes: t tokens of a micro-batch on one device, D model dim, A attention width, F feed-forward dim, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_jax.models import ModelConfig
from lightning_jax.models.config import BYTES
from lightning_jax.parallel import MeshConfig
from lightning_jax.planning.held import Held, expert_copies


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind."""

    weights: int
    moments: int
    gradients: int
    batch: int
    activations: float  # kept from the forward pass for the backward pass
    temporaries: float  # of the layer at work or of the loss, whichever is more
    companions: int = 0  # models beside the one that is trained, with all that they have
    on_host: float = 0  # activations and moments that the host keeps; not in the total

    @property
    def arguments(self) -> int:
        """What is there between steps."""
        return self.weights + self.moments + self.batch + self.companions

    @property
    def total(self) -> float:
        return self.arguments + self.gradients + self.activations + self.temporaries


def memory_of_step(
    model: ModelConfig,
    mesh: MeshConfig,
    sizes: Mapping[str, int],
    held: Held,
    companions: int,
    *,
    rows: int,
    context: int,
    parts: int,
    copies_slices: bool,
) -> Memory:
    """Of a step of `parts` micro-batches, each of which brings a device `rows` rows or a part of them."""
    width = BYTES[model.compute_dtype]
    tokens = rows * context // sizes["sequence"]
    away = held.moments if mesh.moments == "host" else 0
    return Memory(
        weights=held.weights,
        moments=held.moments - away,
        # Micro-batches add to a sum, and so have two.
        gradients=held.trained * (1 if parts == 1 else 2),
        batch=17 * tokens * parts,  # four arrays of int32 and a mask
        activations=_kept_elements(model, sizes["tensor"]) * tokens * width,
        temporaries=max(
            _layer_elements(model, sizes, held, tokens) * width
            + _head_gradient_bytes(model, sizes["tensor"], held)
            + (_slices_bytes(model, held, tokens) if copies_slices else 0),
            _loss_bytes(model, sizes["tensor"], rows, min(model.loss_chunk, context // sizes["sequence"])),
        ),
        companions=companions,
        on_host=_offloaded_elements(model) * tokens * width + away,
    )


def _kept_elements(model: ModelConfig, tensor: int) -> float:
    """Elements per token that the forward pass leaves to the backward pass."""
    if model.remat == "full":
        return (model.num_layers + 2) * model.hidden_size
    if model.remat == "offload":
        return 4 * model.hidden_size
    share = 1.0 if model.remat == "none" else 0.5  # "dots" keeps the products of weights
    layers = sum(layer_elements_per_token(model, kind, tensor) for kind in model.layer_kinds())
    return share * layers + 2 * model.hidden_size


def _offloaded_elements(model: ModelConfig) -> int:
    """Elements per token that wait on the host for the backward pass."""
    return model.num_layers * model.hidden_size if model.remat == "offload" else 0


def layer_elements_per_token(model: ModelConfig, kind: str, tensor: int) -> float:
    """Elements per token that one layer computes, forward; the multiples are fitted to what XLA allocates."""
    D, A, F = model.hidden_size, model.num_heads * model.head_dim / tensor, model.intermediate_size / tensor
    kv = model.num_kv_heads * model.head_dim / tensor
    mixer = 8 * A if kind == "lightning" else 3 * A + 4 * kv
    feed_forward = expert_copies(model) * (5 * F + 2 * D) if model.num_experts else 3 * F
    return mixer + 4.5 * D + feed_forward


def _layer_elements(model: ModelConfig, sizes: Mapping[str, int], held: Held, tokens: int) -> float:
    """Elements that the layer at work holds in its backward pass: its own, its weights gathered and their gradient."""
    per_token = max(layer_elements_per_token(model, kind, sizes["tensor"]) for kind in set(model.layer_kinds()))
    if model.num_experts and model.expert_dispatch != "capacity":
        # The tokens of all devices along these axes come to each of them.
        others, parts = sizes["expert"] * sizes["expert_tensor"] - 1, sizes["expert_tensor"] * sizes["tensor"]
        per_token += others * (expert_copies(model) * (3 * model.intermediate_size / parts))
    elif model.num_experts:
        per_token += (sizes["expert_tensor"] - 1) * expert_copies(model) * 2 * model.hidden_size
    weights = sum(held.gathered.values()) / model.num_layers
    return 2 * per_token * tokens + 2 * weights


def _head_gradient_bytes(model: ModelConfig, tensor: int, held: Held) -> float:
    """What the loss leaves until the layers are done."""
    return BYTES[model.param_dtype] * model.vocab_size * model.hidden_size / tensor if held.ends_trained else 0


def _slices_bytes(model: ModelConfig, held: Held, tokens: int) -> float:
    """One repeat of the pattern: weights, gradients and layer inputs."""
    repeat = len(model.layer_pattern)
    if model.num_layers < 2 * repeat:
        return 0
    inputs = repeat * model.hidden_size * tokens * BYTES[model.compute_dtype] if model.remat == "full" else 0
    return (held.weights + held.trained) * repeat / model.num_layers + inputs


def _loss_bytes(model: ModelConfig, tensor: int, rows: int, chunk: int) -> float:
    """Three buffers of a chunk's logits, and the head: whole along the model dim, and its gradient, in fp32."""
    return 3 * 4 * rows * chunk * model.vocab_size / tensor + 2 * 4 * model.vocab_size * model.hidden_size / tensor
