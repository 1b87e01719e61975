"""Text from a model."""

from lightning_jax.generation.sampling import sample

__all__ = ["sample"]
