"""Continuations of a few short prompts, as a training run shows them."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh

from lightning_jax import parallel
from lightning_jax.generation.generator import GenerationSettings, Generator
from lightning_jax.generation.sampling import Sampling
from lightning_jax.models import ModelConfig


def sample_prompts(
    config: ModelConfig,
    params: nnx.State,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    temperature: float,
    seed: int,
    mesh: Mesh,
) -> list[list[int]]:
    """Token ids that continue each prompt, `num_tokens` of them; the same whenever the parameters are.

    Args:
        config: of the model, with the rope_theta to use.
        params: laid out on the mesh; axis "sequence" of it serves rows here.
        prompts: token ids, at least one each.
        temperature: divides the logits; 0 takes the likeliest token.
    """
    mesh = parallel.without_sequence(mesh)
    params = jax.device_put(params, parallel.shardings(params, mesh))
    shards = parallel.batch_shards(mesh)
    settings = GenerationSettings(
        slots=-(-len(prompts) // shards) * shards,
        capacity=max(map(len, prompts)) + num_tokens,
        prefill_tokens=64,
        decode_steps=num_tokens,
    )
    generator = Generator(config, params, settings, mesh=mesh)
    sampling = Sampling(max_new_tokens=num_tokens, temperature=temperature, seed=seed)
    completions = sorted(generator.generate(prompts, sampling), key=lambda completion: completion.prompt)
    return [completion.ids for completion in completions]
