"""Kernels of lightning attention and their references; needs jax only."""

from pallas_kernels.decode import lightning_attention_step
from pallas_kernels.dispatch import choose_implementation, lightning_attention
from pallas_kernels.sequence_parallel import sequence_parallel_lightning_attention

__all__ = [
    "choose_implementation",
    "lightning_attention",
    "lightning_attention_step",
    "sequence_parallel_lightning_attention",
]
