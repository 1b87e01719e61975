"""Preference, reward and fine-tuning losses equal those of other trainers, however pairs are packed."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model

from lightning_jax import parallel
from lightning_jax.models import HybridLM, RewardModel
from lightning_jax.models.operators import ONE_DEVICE
from lightning_jax.objectives import NextToken, Preference, PreferenceConfig, Reward, RewardModelConfig
from lightning_jax.objectives.preference import REFERENCE, preference_loss
from lightning_jax.objectives.reward import reward_loss
from lightning_jax.train_step import accumulated_sums

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "preference.npz")
N, L, V = len(GOLDEN["margin"]), *GOLDEN["logits"].shape[1:]
EXACT = {"param_dtype": "float64", "compute_dtype": "float64", "logits_dtype": "float64"}
MODEL = tiny_model(**EXACT, num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=4, num_experts=0, experts_per_token=0)
EXPERTS = dataclasses.replace(MODEL, num_experts=4, experts_per_token=2)
LOSSES = {
    "dpo": PreferenceConfig("dpo", 0.1, "cached"),
    "dpo_norm": PreferenceConfig("dpo_norm", 5.0, "cached"),
    "ipo": PreferenceConfig("ipo", 0.1, "cached"),
}
REWARDS = {
    "plain": RewardModelConfig(use_margin=False, centring=0.0),
    "margin": RewardModelConfig(use_margin=True, centring=0.0),
    "centred": RewardModelConfig(use_margin=False, centring=0.01),
}
REDUCTIONS = ("token_mean", "conversation_sum")
ORACLES = [name.removeprefix("loss/") for name in GOLDEN.files if name.startswith("loss/")]
PREFERENCE_ORACLES = [name for name in ORACLES if name.partition("/")[2] in LOSSES]


class Logits:
    """A model whose logits, or scores, are given."""

    operators = ONE_DEVICE

    def __init__(self, outputs):
        self.outputs = outputs

    def __call__(self, tokens_BT, **_):
        return self.outputs, None

    def output_weights(self):
        return jnp.eye(V)


def golden_batch(T):
    """Each pair a row: the chosen chat, the rejected one, padding; and where in the row each golden chat begins."""
    batch = {name: np.zeros((N, T), np.int32) for name in ("inputs", "targets", "segment_ids", "positions")}
    batch["loss_mask"] = np.zeros((N, T), bool)
    batch |= {name: np.zeros((N, T)) for name in (REFERENCE, "margin")}
    starts = {}
    for pair in range(N):
        start = 0
        for side in (0, 1):
            chat = side * N + pair
            stop = start + int(GOLDEN["length"][chat])
            place = slice(start, stop)
            batch["inputs"][pair, place] = GOLDEN["ids"][chat, : stop - start]
            batch["targets"][pair, start : stop - 1] = GOLDEN["ids"][chat, 1 : stop - start]
            batch["segment_ids"][pair, place] = side + 1
            batch["loss_mask"][pair, start : stop - 1] = GOLDEN["mask"][chat, 1 : stop - start]
            batch[REFERENCE][pair, side] = GOLDEN["reference"][chat]
            batch["margin"][pair, side] = GOLDEN["margin"][pair]
            starts[chat] = (pair, start, stop)
            start = stop
    return batch, starts


def at_golden_places(outputs, starts):
    """From the arrays of chats to those of packed rows, differentiably."""
    packed = jnp.zeros((N, 2 * L + 3, *outputs.shape[2:]), outputs.dtype)
    for chat, (row, start, stop) in starts.items():
        packed = packed.at[row, start:stop].set(outputs[chat, : stop - start])
    return packed


def check_golden(objective, name, outputs, spread=lambda outputs: outputs):
    batch, starts = golden_batch(2 * L + 3)

    def loss(outputs):
        model = Logits(at_golden_places(spread(outputs), starts))
        return objective.loss(objective.sums(model, jax.tree.map(jnp.asarray, batch)))[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(outputs))
    np.testing.assert_allclose(value, GOLDEN[f"loss/{name}"], rtol=1e-12 if "trl" not in name else 1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"gradient/{name}"], rtol=1e-6, atol=1e-9)
    return value


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("oracle", PREFERENCE_ORACLES)
def test_preference_losses_and_gradients_equal_their_goldens(oracle, chunk):
    with jax.enable_x64(True):
        config = dataclasses.replace(MODEL, loss_chunk=chunk)
        check_golden(Preference(config, LOSSES[oracle.partition("/")[2]]), oracle, GOLDEN["logits"])


@pytest.mark.parametrize("oracle", [name for name in ORACLES if "/reward_" in name])
def test_reward_losses_and_gradients_equal_their_goldens(oracle):
    def at_the_last_token(scores):
        """Elsewhere the scores are wild: they must not count."""
        wild = 1e3 * jnp.cos(jnp.arange(2 * N * L, dtype=jnp.float64)).reshape(2 * N, L)
        return wild.at[jnp.arange(2 * N), GOLDEN["length"] - 1].set(scores)

    with jax.enable_x64(True):
        objective = Reward(MODEL, REWARDS[oracle.rpartition("_")[2]])
        check_golden(objective, oracle, GOLDEN["scores"], at_the_last_token)


@pytest.mark.parametrize("oracle", [name for name in ORACLES if name.partition("/")[2] in REDUCTIONS])
def test_fine_tuning_reductions_equal_their_goldens(oracle):
    with jax.enable_x64(True):
        check_golden(NextToken(MODEL, reduction=oracle.partition("/")[2]), oracle, GOLDEN["logits"])


def rows_of(pairs, order, T, rows, lengths_seed=0):
    """Pairs in this order laid into rows of T, as many as fit in each, `rows` rows at least."""
    layout, used = [[]], 0
    for number in order:
        size = sum(len(chat) for chat in pairs[number][:2])
        if used + size > T:
            layout.append([])
            used = 0
        layout[-1].append(number)
        used += size
    count = -(-len(layout) // rows) * rows
    batch = {name: np.zeros((count, T), np.int32) for name in ("inputs", "targets", "segment_ids", "positions")}
    batch["loss_mask"] = np.zeros((count, T), bool)
    batch |= {name: np.zeros((count, T)) for name in (REFERENCE, "margin")}
    for row, numbers in enumerate(layout):
        start = 0
        for place, number in enumerate(numbers):
            *chats, prompt, reference, margin = pairs[number]
            for side, chat in enumerate(chats):
                stop, column = start + len(chat), 2 * place + side
                batch["inputs"][row, start:stop] = chat
                batch["targets"][row, start : stop - 1] = chat[1:]
                batch["segment_ids"][row, start:stop] = column + 1
                batch["positions"][row, start:stop] = np.arange(len(chat))
                batch["loss_mask"][row, start + prompt - 1 : stop - 1] = True
                batch[REFERENCE][row, column], batch["margin"][row, column] = reference[side], margin
                start = stop
    return {name: jnp.asarray(array) for name, array in batch.items()}


def random_pairs(seed, count=6):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = int(rng.integers(1, 6))
        asked = rng.integers(0, 32, prompt)
        chats = [np.append(asked, rng.integers(0, 32, rng.integers(1, 12))) for _ in range(2)]
        pairs.append((*chats, prompt, rng.normal(-20, 3, 2), rng.uniform(0, 1)))
    return pairs


@functools.cache
def loss_and_gradients(kind, num_micro_batches, config=MODEL, mesh=None):
    """A jitted function batch -> ((loss, metrics), gradients) of a hybrid."""
    operators = parallel.operators(mesh, config) if mesh else ONE_DEVICE
    model = (RewardModel if kind in REWARDS else HybridLM)(config, rngs=nnx.Rngs(0), operators=operators)
    if kind in REWARDS:
        objective = Reward(config, REWARDS[kind])
    elif kind in LOSSES:
        objective = Preference(config, LOSSES[kind])
    else:
        objective = NextToken(config, reduction=kind)
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        sums = accumulated_sums(lambda each: objective.sums(model, each), batch, num_micro_batches)
        return objective.loss(sums)

    return functools.partial(jax.jit(jax.value_and_grad(loss, has_aux=True)), params)


def assert_same(ours, expected, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max()))


random_cases = settings(max_examples=5, deadline=None, derandomize=True, database=None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo_norm", "centred", *REDUCTIONS])
def test_nothing_depends_on_order_packing_padding_or_micro_batches(kind):
    @random_cases
    @given(st.integers(0, 2**31), st.permutations(range(6)), st.sampled_from([(96, 4), (71, 2)]))
    def check(seed, order, layout):
        pairs, (T, parts) = random_pairs(seed), layout
        alone = loss_and_gradients(kind, 1)(rows_of(pairs, range(6), 36, 8))
        assert_same(loss_and_gradients(kind, parts)(rows_of(pairs, order, T, 4)), alone)

    with jax.enable_x64(True):
        check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo_norm", "centred", "conversation_sum"])
def test_nothing_depends_on_the_mesh(kind):
    mesh = parallel.make_mesh(parallel.MeshConfig.of(data=2, fsdp=2, expert=2))

    @random_cases
    @given(st.integers(0, 2**31), st.permutations(range(16)))
    def check(seed, order):
        pairs = random_pairs(seed, 16)
        alone = loss_and_gradients(kind, 1, EXPERTS)(rows_of(pairs, range(16), 36, 16))
        batch = rows_of(pairs, order, 36, 16)
        rows = {name: jax.device_put(array, parallel.batch_sharding(mesh)) for name, array in batch.items()}
        assert_same(loss_and_gradients(kind, 1, EXPERTS, mesh)(rows), alone)

    with jax.enable_x64(True):
        check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "dpo_norm", "ipo", "margin", "centred", "conversation_sum"])
def test_gradients_equal_finite_differences(kind):
    with jax.enable_x64(True):
        batch = rows_of(random_pairs(2, 3), range(3), 64, 1)
        call = loss_and_gradients(kind, 1)
        params = call.args[0]
        _, gradient = call(batch)
        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
        step = 1e-5

        def moved(sign):
            return call.func(jax.tree.map(lambda x, d: x + sign * step * d, params, direction), batch)[0][0]

        slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        np.testing.assert_allclose((moved(1) - moved(-1)) / (2 * step), slope, rtol=1e-5)


def test_a_pair_without_an_answer_on_a_side_does_not_count():
    """As where the prompt alone fills its share of the row."""
    with jax.enable_x64(True):
        pairs = random_pairs(3, 3)
        batch = rows_of(pairs, range(3), 36, 3)
        call = loss_and_gradients("dpo_norm", 1)
        half = batch | {"loss_mask": batch["loss_mask"] & (batch["segment_ids"] != 2).at[0].set(True)}
        (_, metrics), _ = call(half)
        (_, first), _ = call({name: array.at[1:].set(jnp.zeros((), array.dtype)) for name, array in batch.items()})
        assert metrics["pairs"] == first["pairs"] == 1
        np.testing.assert_allclose(metrics["loss"], first["loss"])
        (_, nothing), gradients = call(jax.tree.map(jnp.zeros_like, batch))
        assert nothing["loss"] == 0
        assert all(np.all(np.isfinite(gradient)) for gradient in jax.tree.leaves(gradients))


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_losses_of_pairs_far_apart_are_linear_and_do_not_overflow(gap):
    def of_reward(gap):
        return reward_loss(RewardModelConfig(use_margin=False, centring=0.0), gap, jnp.zeros(()))

    def of_preference(gap):
        return preference_loss(PreferenceConfig("dpo", 1.0, "cached"), gap, jnp.zeros(()))[0]

    for loss in (of_reward, of_preference):
        value, slope = jax.value_and_grad(loss)(jnp.float32(gap))
        assert (value, slope) == ((1e4, -1) if gap < 0 else (0, 0))
