"""Continuations of a few short prompts, as a training run shows them.

Every token takes a forward pass over the whole text so far: right for a handful of samples in a report, at any
pattern of layers and any layout across devices, and with nothing to keep in step with the training forward.

Shapes: B prompts, T longest prompt plus new tokens, D model dim, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def sample(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    temperature: float,
    seed: int,
    rope_theta: float,
    shards: int = 1,
) -> list[list[int]]:
    """Token ids that continue each prompt, `num_tokens` of them.

    Args:
      prompts: token ids, at least one each.
      temperature: divides the logits; 0 takes the likeliest token.
      shards: into how many parts the model's layout splits its rows; the prompts are filled up to a multiple of it.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("sample: a prompt has no tokens; begin it with the tokenizer's bos or eos token")
    filled = [*prompts, *[prompts[0]] * (-len(prompts) % shards)]
    lengths_B = np.array([len(prompt) for prompt in filled], np.int32)
    tokens_BT = np.zeros((len(filled), lengths_B.max() + num_tokens), np.int32)
    for row, prompt in zip(tokens_BT, filled, strict=True):
        row[: len(prompt)] = prompt
    tokens_BT = np.asarray(
        _continue(graphdef, params, tokens_BT, lengths_B, jax.random.key(seed), num_tokens, temperature, rope_theta)
    )
    continuations = [row[n : n + num_tokens].tolist() for row, n in zip(tokens_BT, lengths_B, strict=True)]
    return continuations[: len(prompts)]


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _continue(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
    num_tokens: int,
    temperature: float,
    rope_theta: jax.Array,
) -> jax.Array:
    model = nnx.merge(graphdef, params)
    rows_B = jnp.arange(tokens_BT.shape[0])

    def append(i: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        # What stands right of a row's end is not seen: every mixer is causal.
        hidden_BTD, _ = model(tokens_BT, rope_theta=rope_theta)
        hidden_BD = hidden_BTD[rows_B, lengths_B + i - 1]
        logits_BV = jnp.dot(hidden_BD, model.output_weights(), preferred_element_type=jnp.float32)
        if temperature == 0:
            next_B = logits_BV.argmax(axis=-1)
        else:
            next_B = jax.random.categorical(jax.random.fold_in(key, i), logits_BV / temperature)
        return tokens_BT.at[rows_B, lengths_B + i].set(next_B.astype(tokens_BT.dtype))

    return jax.lax.fori_loop(0, num_tokens, append, tokens_BT)
