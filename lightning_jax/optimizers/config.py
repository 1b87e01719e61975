"""What the optimizer does: AdamW's numbers, the learning-rate schedule and the batch size over time."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """A learning rate as a function of the stage's step; lengths are in steps of the stage."""

    kind: Literal["wsd", "cosine", "constant", "constant_then_decay", "constant_then_exponential"]
    peak: float
    final: float
    warmup_steps: int
    decay_steps: int  # length of the last, falling part ("cosine": from the end of warm-up to this step of the stage)
    decay_shape: Literal["linear", "cosine", "sqrt"]  # "wsd" and "constant_then_decay"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) with global-norm clipping."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    decay_mask: Literal["all", "matrices"]  # matrices: no decay on norms and other vectors
    clip_norm: float  # 0 for none
    moment_dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BatchSizeConfig:
    """Tokens per step, growing at given counts of the stage's consumed tokens (Text-01: 16M to 128M)."""

    tokens: tuple[int, ...]  # batch sizes in tokens
    starts: tuple[int, ...]  # tokens consumed at which each begins; the first is 0
    micro_batch_tokens: int  # most tokens in one forward pass over all devices; 0: the whole batch
