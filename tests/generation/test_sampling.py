"""Choosing a token: transformers' scores, the model's distribution, and one line per mistake."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.generation.sampling import (
    Needs,
    RowSettings,
    Sampling,
    SamplingError,
    check,
    choose,
    likeliest,
    lowest_kept,
    penalised,
)

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "sampling.npz")
LOGITS = jnp.asarray(GOLDEN["logits"])
SETTINGS = json.loads(str(GOLDEN["settings"]))
SEEN = jnp.zeros(LOGITS.shape, bool).at[np.arange(4)[:, None], GOLDEN["seen"]].set(True)
EVERYTHING = Needs(noise=True, truncation=True, penalty=True)


def rows(*samplings):
    return RowSettings.of(samplings, 8)


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_equal_transformers(name):
    settings = rows(*[Sampling(max_new_tokens=1, **SETTINGS[name])] * 4)
    scores = penalised(LOGITS, SEEN, settings.repetition_penalty_B[:, None]) / settings.temperature_B[:, None]
    scores = jnp.where(scores >= lowest_kept(scores, settings), scores, -jnp.inf)
    np.testing.assert_allclose(scores, GOLDEN[f"scores/{name}"], rtol=1e-6)


def test_draws_follow_the_scores():
    """By transformers' scores for all settings together, 20,000 draws within five standard deviations."""
    settings = rows(*[Sampling(max_new_tokens=1, **SETTINGS["all"])] * 4)
    expected = np.asarray(jax.nn.softmax(GOLDEN["scores/all"], axis=-1))
    draw = jax.vmap(lambda keys: choose(LOGITS, keys, settings, SEEN, EVERYTHING)[0])
    tokens = np.asarray(draw(jax.random.split(jax.random.key(1), (20_000, 4))))
    for row in range(4):
        share = np.bincount(tokens[:, row], minlength=48) / 20_000
        error = np.abs(share - expected[row]) / np.sqrt(np.maximum(expected[row] * (1 - expected[row]), 1e-9) / 20_000)
        assert error.max() < 5


def test_log_probs_are_the_models_at_the_temperature_whatever_is_cut_off():
    settings = rows(
        Sampling(max_new_tokens=1, temperature=0.7, top_k=3, repetition_penalty=2.0),
        Sampling(max_new_tokens=1, temperature=0.0, repetition_penalty=2.0),
        Sampling(max_new_tokens=1),
        Sampling(max_new_tokens=1, top_p=0.1),
    )
    tokens, log_probs = choose(LOGITS, jax.random.split(jax.random.key(0), 4), settings, SEEN, EVERYTHING)
    for row, temperature in enumerate((0.7, 1.0, 1.0, 1.0)):
        expected = jax.nn.log_softmax(LOGITS[row] / temperature)[tokens[row]]
        np.testing.assert_allclose(log_probs[row], expected, rtol=1e-5)


def test_rows_keep_their_own_settings():
    alone = [Sampling(max_new_tokens=1, **setting) for setting in SETTINGS.values()][:4]
    keys = jax.random.split(jax.random.key(3), 4)
    together, _ = choose(LOGITS, keys, rows(*alone), SEEN, EVERYTHING)
    for row, sampling in enumerate(alone):
        one, _ = choose(LOGITS, keys, rows(*[sampling] * 4), SEEN, Needs.of([sampling]))
        assert together[row] == one[row]


def test_the_likeliest_token_is_the_first_of_equals():
    assert likeliest(jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, 0.0]])).tolist() == [1, 2]


def test_greedy_takes_the_likeliest_after_the_penalty():
    sampling = Sampling(max_new_tokens=1, temperature=0.0, repetition_penalty=100.0)
    tokens, _ = choose(
        LOGITS, jax.random.split(jax.random.key(0), 4), rows(*[sampling] * 4), SEEN, Needs.of([sampling])
    )
    np.testing.assert_array_equal(tokens, np.argmax(np.where(SEEN & (LOGITS > 0), LOGITS / 100, LOGITS), axis=1))


def test_extreme_settings_keep_the_likeliest_token():
    for setting in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        settings = rows(*[Sampling(max_new_tokens=1, **setting)] * 4)
        kept = lowest_kept(LOGITS, settings) <= LOGITS
        np.testing.assert_array_equal(kept.sum(axis=1), 1)
    settings = rows(*[Sampling(max_new_tokens=1, top_k=0, top_p=1.0, min_p=0.0)] * 4)
    assert (lowest_kept(LOGITS, settings) <= LOGITS).all()


def test_every_mistake_has_its_line():
    wrong = Sampling(
        max_new_tokens=0,
        temperature=-1.0,
        top_k=-1,
        top_p=1.5,
        min_p=-0.1,
        repetition_penalty=0.0,
        repetition_tokens=-1,
        repetition_probability=1.0,
        stop=("",),
        stop_ids=(99,),
        samples=0,
    )
    with pytest.raises(SamplingError) as raised:
        check([wrong, wrong], 48)
    fields = [line.partition(":")[0] for line in str(raised.value).splitlines()]
    wanted = {field.name for field in dataclasses.fields(Sampling)} - {"seed"}
    assert len(fields) == len(set(fields))
    assert set(fields) == wanted
    assert Sampling(max_new_tokens=1).problems() == []
