"""Text from a model: prompts into completions, with the state that the model keeps of each sequence."""

from lightning_jax.generation.completion import Completion
from lightning_jax.generation.generator import GenerationError, GenerationSettings, Generator
from lightning_jax.generation.log_probs import completion_batch, log_prob_gap, token_log_probs
from lightning_jax.generation.prompt_samples import sample_prompts
from lightning_jax.generation.sampling import Sampling, SamplingError
from lightning_jax.generation.speed import Speed
from lightning_jax.generation.text import TextStream

__all__ = [
    "Completion",
    "GenerationError",
    "GenerationSettings",
    "Generator",
    "Sampling",
    "SamplingError",
    "Speed",
    "TextStream",
    "completion_batch",
    "log_prob_gap",
    "sample_prompts",
    "token_log_probs",
]
