"""What a model is: its sizes and choices, validated, with the arithmetic that follows from them.

Sources: MiniMax-01 (arXiv 2501.08313) sections 2 and 4.2; the released config.json of MiniMax-M1; Llama
(arXiv 2407.21783).
"""

import math
from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["lightning", "softmax"]
FlopsConvention = Literal["6N", "6N+12LHKT", "6(N-VD)+12LHKT", "model"]
LoraTarget = Literal[
    "mixer.query",
    "mixer.key",
    "mixer.value",
    "mixer.query_key_value",
    "mixer.gate",
    "mixer.output",
    "feed_forward.gate",
    "feed_forward.up",
    "feed_forward.down",
]

BYTES = {"float32": 4, "bfloat16": 2}
MIXER_WEIGHTS: dict[LayerKind, tuple[LoraTarget, ...]] = {
    "lightning": ("mixer.query_key_value", "mixer.gate", "mixer.output"),
    "softmax": ("mixer.query", "mixer.key", "mixer.value", "mixer.output"),
}
FEED_FORWARD_WEIGHTS: tuple[LoraTarget, ...] = ("feed_forward.gate", "feed_forward.up", "feed_forward.down")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's: wavelengths beyond `original_context_length / low_frequency_factor` stretch by `factor`."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_length: int

    def problems(self) -> list[str]:
        """What is wrong with the scaling, one line each."""
        found = []
        if self.factor < 1:
            found.append(f"factor: {self.factor} would shorten the context; at least 1")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            found.append(
                f"low_frequency_factor: {self.low_frequency_factor} must be positive and below "
                f"high_frequency_factor={self.high_frequency_factor}"
            )
        if self.original_context_length < 1:
            found.append(f"original_context_length: {self.original_context_length} is not positive")
        return found


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) that are trained in place of the weights: W + alpha / rank * down up."""

    rank: int
    alpha: float
    targets: tuple[LoraTarget, ...]  # weights of every layer that has them; of experts each one's own

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def problems(self) -> list[str]:
        found = [] if self.rank > 0 else [f"rank: {self.rank} is not positive"]
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            found.append(f"alpha: {self.alpha} is not a positive number")
        if not self.targets:
            found.append('targets: empty; name a weight, such as "mixer.output"')
        if len(set(self.targets)) < len(self.targets):
            found.append("targets: a weight is named twice; name each once")
        return found

    def problems_with(self, model: "ModelConfig") -> list[str]:
        """What of the targets no layer of a model has."""
        known = dict.fromkeys(name for kind in model.layer_pattern for name in MIXER_WEIGHTS[kind])
        known |= dict.fromkeys(FEED_FORWARD_WEIGHTS)
        return [
            f"targets: no layer of this model has {target}; there is {', '.join(known)}"
            for target in self.targets
            if target not in known
        ]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of repeating layers. Names follow the papers; sizes are in elements."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    layer_pattern: tuple[LayerKind, ...]  # the repeating unit, e.g. ("lightning",) * 7 + ("softmax",)
    # Attention. Lightning layers use num_heads for keys and values too; softmax layers group them (GQA).
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # leading dimensions of each softmax head that rotate; head_dim rotates all of them
    rope_theta: float  # a stage may override it
    rope_scaling: RopeScaling | None
    lightning_norm_eps: float
    attention_implementation: Literal["auto", "xla", "blocked", "cudnn"]
    lightning_implementation: Literal["auto", "xla", "pallas_tpu", "pallas_gpu", "reference"]
    # Feed-forward: SwiGLU, dense where num_experts is 0, else a mixture of experts.
    intermediate_size: int
    num_experts: int
    experts_per_token: int
    expert_dispatch: Literal["auto", "ragged", "blocks", "capacity"]
    capacity_factor: float  # expert_dispatch="capacity" only: places of an expert, as a multiple of an even share
    capacity_group: int  # and so many neighbouring tokens of a row share them
    router_aux_loss: Literal["paper", "huggingface"]
    router_aux_coefficient: float
    # Residual stream.
    norm_placement: Literal["pre", "post"]
    residual_alpha: float  # multiplies the residual; DeepNorm: (2 * num_layers) ** 0.25
    residual_beta: float  # multiplies the sub-layer's output; 1.0 in every released model
    rms_norm_eps: float
    # Ends.
    tie_embeddings: bool
    initializer: Literal["normal", "deepnorm", "tinyllama"]
    initializer_range: float  # standard deviation, initializer="normal" only
    # Numerics and memory.
    param_dtype: Literal["float32", "bfloat16"]
    compute_dtype: Literal["float32", "bfloat16"]
    logits_dtype: Literal["float32", "bfloat16"]
    loss_chunk: int  # tokens of each sequence whose logits exist at one time
    remat: Literal["none", "dots", "full", "offload"]

    def problems(self) -> list[str]:
        """What is wrong with the sizes and choices, one line each: "field: what is wrong; what would be right"."""
        found = []
        positive = "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size rope_theta"
        positive += " lightning_norm_eps rms_norm_eps capacity_factor residual_alpha residual_beta initializer_range"
        for name in [*positive.split(), "capacity_group", "loss_chunk"]:
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                found.append(f"{name}: {getattr(self, name)} is not a positive number")
        if not self.layer_pattern:
            found.append("layer_pattern: empty; name at least one kind of layer")
        elif len(self.layer_pattern) > self.num_layers > 0:
            found.append(
                f"layer_pattern: {len(self.layer_pattern)} layers exceed num_layers={self.num_layers}; shorten it"
            )
        if min(self.num_kv_heads, self.num_heads) > 0 and self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.num_kv_heads))
            found.append(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads={self.num_heads}; use {nearest}")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            found.append(f"rotary_dim: {self.rotary_dim} must be even and between 0 and head_dim={self.head_dim}")
        if self.num_experts < 0:
            found.append(f"num_experts: {self.num_experts} is negative; 0 is a dense feed-forward")
        elif not min(self.num_experts, 1) <= self.experts_per_token <= self.num_experts:
            right = f"between 1 and num_experts={self.num_experts}" if self.num_experts else "0 where num_experts=0"
            found.append(f"experts_per_token: {self.experts_per_token} must be {right}")
        if self.router_aux_coefficient < 0:
            found.append(f"router_aux_coefficient: {self.router_aux_coefficient} is negative; 0 turns the loss off")
        return found

    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, the pattern repeated and cut to num_layers."""
        repeats = -(-self.num_layers // len(self.layer_pattern))
        return (self.layer_pattern * repeats)[: self.num_layers]

    def num_parameters(self) -> int:
        """All parameters, embeddings included."""
        ends = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size + self.hidden_size
        return ends + self._layer_parameters(self.num_experts)

    def num_active_parameters(self) -> int:
        """Parameters a token passes through, without embedding and head: the convention behind MiniMax-01's 45.9B."""
        return self._layer_parameters(self.experts_per_token) + self.hidden_size

    def _layer_parameters(self, experts: int) -> int:
        """Parameters of all layers, counting so many of the experts."""
        D, A = self.hidden_size, self.num_heads * self.head_dim
        mixer = {"lightning": 5 * D * A + A, "softmax": 2 * D * A + 2 * D * self.num_kv_heads * self.head_dim}
        feed_forward = 3 * D * self.intermediate_size * (experts if self.num_experts else 1) + D * self.num_experts
        return sum(mixer[kind] + feed_forward + 2 * D for kind in self.layer_kinds())

    def flops_per_token(self, context_length: int, convention: FlopsConvention) -> float:
        """Floating-point operations of a training step, forward and backward, per token of a full context.

        "6N": 6 for every active parameter, embedding and head included (arXiv 2001.08361 leaves the embedding out).
        "6N+12LHKT": PaLM's (arXiv 2204.02311 appendix B): as well, attention over the whole square of softmax layers.
        "6(N-VD)+12LHKT": the same without the input embedding, which is only looked up; TinyLlama's 56% MFU.
        "model": the matrix products that the mathematics needs: weights and head, the causal half of softmax attention,
            the state's update and reading in lightning layers; nothing for recomputation or a chunk's inner products.
        """
        V, D, T = self.vocab_size, self.hidden_size, context_length
        H, K = self.num_heads, self.head_dim
        softmax = self.layer_kinds().count("softmax")
        weights = self.num_active_parameters() + (1 if self.tie_embeddings else 2) * V * D
        match convention:
            case "6N":
                return 6 * weights
            case "6N+12LHKT":
                return 6 * weights + 12 * softmax * H * K * T
            case "6(N-VD)+12LHKT":
                return 6 * (weights - (0 if self.tie_embeddings else V * D)) + 12 * softmax * H * K * T
            case "model":
                lightning = self.num_layers - softmax
                norms = (2 * self.num_layers + 1) * D + lightning * H * K
                products = self.num_active_parameters() - norms + V * D
                return 6 * products + 6 * softmax * H * K * (T + 1) + 12 * lightning * H * K * K

    def weight_bytes(self, dtype: Literal["float32", "bfloat16"]) -> int:
        """Bytes of the weights stored in `dtype`; routers are always fp32."""
        routers = self.num_layers * self.hidden_size * self.num_experts
        return BYTES[dtype] * (self.num_parameters() - routers) + 4 * routers

    def optimizer_bytes(self, dtype: Literal["float32", "bfloat16"]) -> int:
        """Bytes of Adam's two moments, kept in `dtype`."""
        return 2 * BYTES[dtype] * self.num_parameters()

    def kv_cache_bytes_per_token(self) -> int:
        """Bytes that each token of a context adds to the softmax layers' cache, in the compute dtype."""
        softmax = self.layer_kinds().count("softmax")
        return softmax * 2 * self.num_kv_heads * self.head_dim * BYTES[self.compute_dtype]

    def state_bytes_per_sequence(self) -> int:
        """Bytes of the lightning layers' fp32 states of one sequence, at any context length."""
        return self.layer_kinds().count("lightning") * self.num_heads * self.head_dim**2 * 4
