"""A model, prompts and a generator small enough for every test of generation."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx
from tiny_model import tiny_model

from lightning_jax import parallel
from lightning_jax.generation import GenerationSettings, Generator
from lightning_jax.input_pipeline import TokenizerConfig
from lightning_jax.input_pipeline.tokenizers import ByteTokenizer
from lightning_jax.models import HybridLM

CONFIG = tiny_model(vocab_size=258, num_layers=3, initializer_range=0.3)
SETTINGS = GenerationSettings(slots=3, capacity=64, prefill_tokens=16, decode_steps=4)
TOKENIZER = ByteTokenizer(TokenizerConfig(kind="bytes", path="", vocab_size=258, bos="<s>", eos="</s>"))
PROMPTS = [np.random.default_rng(length).integers(0, 258, length).tolist() for length in (5, 1, 40, 17, 3, 30, 2)]


@functools.cache
def model(compute_dtype: str = "float32") -> HybridLM:
    return HybridLM(dataclasses.replace(CONFIG, compute_dtype=compute_dtype), rngs=nnx.Rngs(0))


def params() -> nnx.State:
    """Its parameters, which a test may change."""
    return jax.tree.map(lambda weight: weight, nnx.state(model(), nnx.Param))


@functools.cache
def generator(layout: tuple[int, int, int, int] | None = None, **settings: int) -> Generator:
    """On a mesh (data, fsdp, expert, tensor), or on one device; not for a test that changes it."""
    chosen = dataclasses.replace(SETTINGS, **settings)
    if layout is None:
        return Generator(CONFIG, params(), chosen, tokenizer=TOKENIZER)
    mesh = parallel.make_mesh(
        parallel.MeshConfig.of(**dict(zip(("data", "fsdp", "expert", "tensor"), layout, strict=True))),
        jax.devices()[: int(np.prod(layout))],
    )
    laid_out = jax.device_put(params(), parallel.shardings(params(), mesh))
    return Generator(CONFIG, laid_out, chosen, mesh=mesh, tokenizer=TOKENIZER)


def ordered(completions):
    """All of them, by prompt and sample."""
    return sorted(completions, key=lambda completion: (completion.prompt, completion.sample))
