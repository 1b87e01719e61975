"""Kernels of lightning attention and their references; needs jax only."""

from pallas_kernels.dispatch import lightning_attention

__all__ = ["lightning_attention"]
