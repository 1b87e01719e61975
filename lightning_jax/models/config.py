"""What a model is: its sizes and choices, validated, with the arithmetic that follows from them.

Sources: MiniMax-01 (arXiv 2501.08313) section 2 and 4.2; the released config.json of MiniMax-M1; Llama (arXiv 2407.21783).
"""

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["lightning", "softmax"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling: wavelengths beyond `original_context_length / low_frequency_factor` stretch by `factor`."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_length: int


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
    lightning_implementation: Literal["auto", "xla", "reference"]
    # Feed-forward: SwiGLU, dense where num_experts is 0, else a mixture of experts.
    intermediate_size: int
    num_experts: int
    experts_per_token: int
    expert_dispatch: Literal["auto", "ragged", "blocks", "capacity"]
    capacity_factor: float  # expert_dispatch="capacity" only
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
    remat: Literal["none", "dots", "full"]
