"""Samples are what the model's own forward pass says, one token after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx

from lightning_jax.config import load_config
from lightning_jax.generation import sample
from lightning_jax.models import HybridLM

THETA = 1e4


@pytest.fixture(scope="module")
def model():
    flags = tiny_run.arguments(tiny_run.REPOSITORY, "unused")
    overrides = [flag.removeprefix("--config.") for flag in flags if flag.startswith("--config.")]
    return HybridLM(load_config(tiny_run.CONFIG, overrides).model, rngs=nnx.Rngs(0))


def _sample(model, prompts, temperature, seed=0, **more):
    graphdef, params = nnx.split(model, nnx.Param)
    options = {"num_tokens": 6, "temperature": temperature, "seed": seed, "rope_theta": THETA}
    return sample(graphdef, params, prompts, **options, **more)


def test_greedy_samples_of_prompts_of_different_lengths_are_those_of_each_prompt_alone(model):
    prompts = [[5, 17, 3, 250, 9], [7]]
    graphdef, params = nnx.split(model)

    @jax.jit
    def likeliest(tokens_BT):
        model = nnx.merge(graphdef, params)
        return jnp.argmax(model(tokens_BT, rope_theta=THETA)[0] @ model.output_weights(), axis=-1)

    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            padded = jnp.array([tokens + [0] * (11 - len(tokens))])
            tokens.append(int(likeliest(padded)[0, len(tokens) - 1]))
        expected.append(tokens[len(prompt) :])
    assert _sample(model, prompts, temperature=0) == expected
    assert _sample(model, prompts, temperature=0, shards=8) == expected


def test_samples_follow_the_models_distribution(model):
    hidden_BTD, _ = model(jnp.array([[4, 8]]), rope_theta=THETA)
    probabilities = np.asarray(jax.nn.softmax(hidden_BTD[0, -1] @ model.output_weights() / 0.5))
    graphdef, params = nnx.split(model, nnx.Param)
    drawn = sample(graphdef, params, [[4, 8]] * 4000, num_tokens=1, temperature=0.5, seed=1, rope_theta=THETA)
    counts = np.bincount(np.array(drawn)[:, 0], minlength=len(probabilities))
    likely = probabilities > 0.004
    errors = np.abs(counts / 4000 - probabilities) / np.sqrt(probabilities * (1 - probabilities) / 4000)
    assert likely.any()
    assert errors[likely].max() < 5


def test_seed_decides_the_sample(model):
    first, again, other = (_sample(model, [[1, 2, 3]], temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match="begin it with the tokenizer's bos or eos"):
        _sample(model, [[1], []], temperature=0)
