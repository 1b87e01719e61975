"""Exact rollouts are what the training forward draws token by token, with its log-probabilities to the last bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_generation import CONFIG, PROMPTS, SETTINGS, TOKENIZER, ordered

from lightning_jax.generation import Generator, Sampling, completion_batch
from lightning_jax.generation.exact import KEYS, NUMBERS, drawn_tokens, exact_completions
from lightning_jax.generation.slots import sample_key
from lightning_jax.models import HybridLM
from lightning_jax.objectives import PolicyGradient, algorithms
from lightning_jax.objectives.policy_gradient import ADVANTAGES, OLD, RECORDED, sequence_log_probs
from lightning_jax.train_step import accumulated_sums

LENGTH, ROWS = 64, 8
SAMPLING = Sampling(max_new_tokens=20, temperature=0.7, samples=2, seed=5, stop_ids=(3, 4, 5))
MODELS = {
    "hybrid with experts": CONFIG,
    "dense hybrid": dataclasses.replace(CONFIG, num_experts=0, experts_per_token=0, remat="full"),
    "llama": dataclasses.replace(
        CONFIG, layer_pattern=("softmax",), num_experts=0, experts_per_token=0, norm_placement="pre", residual_alpha=1.0
    ),
}


class Trainer:
    """The training forward of a model, as a run compiles it: batches of so many rows."""

    def __init__(self, config):
        self.config = config
        self.graphdef, self.params = nnx.split(HybridLM(config, rngs=nnx.Rngs(0)), nnx.Param)
        given = {"temperature": SAMPLING.temperature}
        self._drawn = jax.jit(lambda p, batch: drawn_tokens(nnx.merge(self.graphdef, p), config, batch, **given))
        self._log_probs = jax.jit(
            lambda p, batch: sequence_log_probs(nnx.merge(self.graphdef, p), config, batch, **given)[0]
        )
        self.draws = 0

    def in_batches(self, step, rows):
        """The results of a step for any number of rows."""
        count = len(rows["inputs"])
        filled = {name: np.resize(array, (-(-count // ROWS) * ROWS, *array.shape[1:])) for name, array in rows.items()}
        parts = [
            step(self.params, {name: array[first : first + ROWS] for name, array in filled.items()})
            for first in range(0, count, ROWS)
        ]
        return jax.tree.map(lambda *each: np.concatenate(each)[:count], *parts)

    def draw(self, rows):
        self.draws += 1
        return self.in_batches(self._drawn, rows)

    def log_probs(self, rows):
        return self.in_batches(self._log_probs, rows)

    def rollouts(self, *, drafts=None, sampling=SAMPLING):
        """Exact completions of the prompts; `drafts` are the weights that propose, if not the trainer's own."""
        generator = Generator(self.config, drafts or self.params, SETTINGS, tokenizer=TOKENIZER)
        return ordered(exact_completions(generator, self.draw, PROMPTS, sampling, LENGTH))


@functools.cache
def trainer(name, dtype="float32"):
    return Trainer(dataclasses.replace(MODELS[name], compute_dtype=dtype))


@functools.cache
def rollouts(name, dtype="float32"):
    return trainer(name, dtype).rollouts()


def rows_of(completions):
    rows = completion_batch([PROMPTS[each.prompt] for each in completions], [each.ids for each in completions], LENGTH)
    rows[RECORDED] = np.zeros(rows["loss_mask"].shape, np.float32)
    rows[RECORDED][rows["loss_mask"]] = np.concatenate([each.log_probs for each in completions])
    return rows


def shuffled(rows, seed):
    order = np.random.default_rng(seed).permutation(len(rows["inputs"]))
    return {name: array[order] for name, array in rows.items()}


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


every_model = pytest.mark.parametrize("name", ["hybrid with experts", slow("dense hybrid"), slow("llama")])
every_dtype = pytest.mark.parametrize("dtype", ["bfloat16", slow("float32")])


@every_model
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_log_prob_is_the_trainers_to_the_last_bit_whatever_shares_its_batch(name, dtype):
    rows = rows_of(rollouts(name, dtype))
    for seed in range(3):
        mixed = shuffled(rows, seed)
        mask = mixed["loss_mask"]
        np.testing.assert_array_equal(mixed[RECORDED][mask], trainer(name, dtype).log_probs(mixed)[mask])


class Watched(PolicyGradient):
    """Says how far the log-probabilities that get the gradient are from those of the rollouts."""

    def sums_of_log_probs(self, log_prob_BT, entropy_BT, router, batch):
        gap_BT = jnp.where(batch["loss_mask"], jnp.abs(log_prob_BT - batch[RECORDED]), 0)
        return super().sums_of_log_probs(log_prob_BT, entropy_BT, router, batch), jnp.sum(gap_BT)

    def loss(self, sums):
        return super().loss(sums[0])[0], sums[1]


@every_model
@every_dtype
@pytest.mark.parametrize("parts", [2, slow(1)])
def test_the_first_update_begins_with_ratios_of_exactly_one(name, dtype, parts):
    """In the program that takes the gradient, too, of which the forward is but a part; whole or in micro-batches."""
    its = trainer(name, dtype)
    rows = {key: array[: ROWS * parts] for key, array in shuffled(rows_of(rollouts(name, dtype)), 7).items()}
    rows = {key: np.resize(array, (ROWS * parts, *array.shape[1:])) for key, array in rows.items()}
    rows |= {OLD: rows[RECORDED], ADVANTAGES: np.ones_like(rows[RECORDED])}
    objective = Watched(its.config, algorithms.cispo(), SAMPLING.temperature)

    def loss(params):
        model = nnx.merge(its.graphdef, params)
        return objective.loss(accumulated_sums(lambda each: objective.sums(model, each), rows, parts))

    (_, gap), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(its.params)
    assert gap == 0
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-3


def drawn_one_by_one(its, prompt, number, sample):
    """By the definition: the whole row through the training forward for every token."""
    ids = []
    key_2 = sample_key(SAMPLING, number, sample)
    while len(ids) < SAMPLING.max_new_tokens and not (ids and ids[-1] in SAMPLING.stop_ids):
        rows = completion_batch([prompt], [[*ids, 0]], LENGTH)
        rows |= {KEYS: np.broadcast_to(key_2, (1, LENGTH, 2)), NUMBERS: np.full((1, LENGTH), len(ids), np.int32)}
        tokens_NT, _ = its.draw(rows)
        ids.append(int(tokens_NT[0, len(prompt) - 1 + len(ids)]))
    return ids


@every_model
@every_dtype
def test_completions_are_those_that_the_training_forward_draws_token_by_token(name, dtype):
    for completion in rollouts(name, dtype)[::5]:
        prompt = PROMPTS[completion.prompt]
        assert completion.ids == drawn_one_by_one(trainer(name, dtype), prompt, completion.prompt, completion.sample)


@pytest.mark.slow
def test_proposals_of_other_weights_change_the_price_alone():
    its = Trainer(MODELS["hybrid with experts"])
    expected = its.rollouts()
    cheap, its.draws = its.draws, 0
    others = jax.tree.map(lambda weight: 1.5 * weight, its.params)
    assert its.rollouts(drafts=others) == expected
    assert its.draws > cheap


@pytest.mark.slow
def test_fp32_proposals_agree_and_cost_one_pass():
    its = Trainer(MODELS["dense hybrid"])
    generator = Generator(its.config, its.params, SETTINGS, tokenizer=TOKENIZER)
    fast = ordered(generator.generate(PROMPTS, SAMPLING))
    exact = its.rollouts()
    assert its.draws == 1
    for one, other in zip(fast, exact, strict=True):
        assert (one.ids, one.text, one.finish_reason) == (other.ids, other.text, other.finish_reason)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
    assert any(one.log_probs != other.log_probs for one, other in zip(fast, exact, strict=True))


@pytest.mark.parametrize(
    "change", [{"temperature": 0.0}, {"top_p": 0.9}, {"repetition_penalty": 1.1}, {"stop": ("a",)}]
)
def test_other_distributions_are_refused(change):
    with pytest.raises(ValueError, match="drawn from the model's own distribution"):
        trainer("hybrid with experts").rollouts(sampling=dataclasses.replace(SAMPLING, **change))


@pytest.mark.slow
def test_completions_end_by_the_rules_of_the_decoding_loop():
    """For repetition a head a thousand times as large makes every token certain, from wherever the loop goes on."""
    its = Trainer(MODELS["hybrid with experts"])
    others = jax.tree.map(lambda weight: 1.5 * weight, its.params)
    its.params["head"].set_value(1000 * its.params["head"].get_value())
    sampling = dataclasses.replace(SAMPLING, repetition_tokens=5, stop_ids=())
    for drafts in (its.params, others):
        ends = {(len(each.ids), each.finish_reason) for each in its.rollouts(drafts=drafts, sampling=sampling)}
        assert ends == {(5, "repetition")}
    reasons = {each.finish_reason for each in rollouts("dense hybrid")}
    assert reasons == {"stop", "length"}
