"""Completions depend on the prompt, the sampling and the seed: not on slots, neighbours, order or layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_generation import CONFIG, PROMPTS, SETTINGS, TOKENIZER, generator, model, ordered, params

from lightning_jax.generation import GenerationError, GenerationSettings, Generator, Sampling, SamplingError, decoding

GREEDY = Sampling(max_new_tokens=9, temperature=0.0)
DRAWN = Sampling(max_new_tokens=9, temperature=0.9, samples=2, seed=3)


def assert_same(actual, expected, tolerance=1e-5):
    assert [c.ids for c in actual] == [c.ids for c in expected]
    assert [(c.prompt, c.sample, c.finish_reason) for c in actual] == [
        (c.prompt, c.sample, c.finish_reason) for c in expected
    ]
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0, atol=tolerance)


def test_greedy_completions_are_what_the_forward_pass_says_token_by_token():
    forward = jax.jit(lambda tokens: model().logits(model()(tokens)[0]))
    for completion in ordered(generator().generate(PROMPTS, GREEDY)):
        tokens = list(PROMPTS[completion.prompt])
        for token, log_prob in zip(completion.ids, completion.log_probs, strict=True):
            logits = forward(jnp.array([tokens + [0] * (64 - len(tokens))]))[0, len(tokens) - 1]
            assert token == int(jnp.argmax(logits))
            np.testing.assert_allclose(log_prob, jax.nn.log_softmax(logits)[token], atol=1e-5)
            tokens.append(token)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_slots_and_neighbours_change_nothing(sampling):
    one_by_one = ordered(generator(slots=1).generate(PROMPTS, sampling))
    assert len(one_by_one) == len(PROMPTS) * sampling.samples
    for slots in (3, 16):
        assert_same(ordered(generator(slots=slots).generate(PROMPTS, sampling)), one_by_one)


@pytest.mark.slow
def test_the_order_of_prompts_and_the_steps_of_a_call_change_nothing():
    expected = ordered(generator().generate(PROMPTS, GREEDY))
    backwards = ordered(generator(decode_steps=7).generate(PROMPTS[::-1], GREEDY))
    assert [completion.ids for completion in backwards[::-1]] == [completion.ids for completion in expected]


def test_seed_prompt_and_sample_decide_a_draw():
    first, again = (ordered(generator().generate([PROMPTS[0]] * 2, DRAWN)) for _ in range(2))
    other = ordered(generator().generate([PROMPTS[0]] * 2, dataclasses.replace(DRAWN, seed=4)))
    assert [c.ids for c in first] == [c.ids for c in again]
    assert len({tuple(c.ids) for c in (*first, *other)}) == 8


def test_every_token_of_every_sample_is_a_draw_of_its_own():
    """Where all logits are 0, 480 tokens are uniform over 258: about 218 of them different, and no sample repeats."""
    uniform = Generator(CONFIG, params(), SETTINGS)
    uniform.params["head"].set_value(0 * uniform.params["head"].get_value())
    completions = list(uniform.generate(PROMPTS[:4], Sampling(max_new_tokens=20, samples=6)))
    drawn = np.array([completion.ids for completion in completions])
    assert 200 < len(np.unique(drawn)) < 236
    assert min(len(set(row)) for row in drawn) > 14
    for first in range(len(drawn)):
        assert np.sum(drawn[first] == drawn[first + 1 :], axis=1, initial=0).max(initial=0) <= 3


def test_prompts_come_and_go_without_compiling():
    """Three sizes of pieces, empty slots and prompts (3), the copy into a slot, the decoding loop; none once more."""
    several = Generator(CONFIG, params(), dataclasses.replace(SETTINGS, slots=2, capacity=130, prefill_tokens=32))
    before = decoding.compilations()
    list(several.generate(PROMPTS, DRAWN))
    compiled = decoding.compilations()
    assert before < compiled <= before + 8  # another test may have compiled some of them
    more = [PROMPTS[(i * 5) % 7][: 1 + i] for i in range(9)]
    list(several.generate(more, dataclasses.replace(DRAWN, seed=9, temperature=0.3, samples=3, stop_ids=(1, 2))))
    several.params = jax.tree.map(lambda weight: weight * 1.01, several.params)
    list(several.generate(more[::-1], DRAWN))
    assert decoding.compilations() == compiled


def test_a_prompt_is_prefilled_once_for_all_its_samples():
    busy = generator(slots=2)
    list(busy.generate([PROMPTS[2]], DRAWN))  # compiles
    before = busy.speed.prefill_tokens
    completions = list(busy.generate([PROMPTS[2]], dataclasses.replace(DRAWN, samples=5)))
    assert sorted(completion.sample for completion in completions) == [0, 1, 2, 3, 4]
    assert busy.speed.prefill_tokens - before == len(PROMPTS[2]) - 1


def test_prompts_are_taken_when_there_is_room_for_them():
    taken = []

    def prompts():
        for number, prompt in enumerate(PROMPTS):
            taken.append(number)
            yield prompt

    completions = generator(slots=1).generate(prompts(), GREEDY)
    assert taken == []
    assert next(completions).prompt == 0
    assert taken == [0]
    assert next(completions).prompt == 1
    assert taken == [0, 1]


@pytest.mark.slow
def test_each_prompt_may_have_its_own_sampling():
    samplings = [GREEDY, DRAWN, dataclasses.replace(GREEDY, max_new_tokens=2, repetition_penalty=1.5)]
    together = ordered(generator().generate(PROMPTS[:3], samplings))
    for number, sampling in enumerate(samplings):
        alone = ordered(generator().generate(PROMPTS[:3], sampling))
        assert_same(
            [completion for completion in together if completion.prompt == number],
            [completion for completion in alone if completion.prompt == number],
        )


def test_a_stop_token_ends_a_completion_and_is_its_last():
    (whole,) = generator().generate([PROMPTS[0]], GREEDY)
    assert (whole.finish_reason, len(whole.ids)) == ("length", 9)
    stop = whole.ids[4]
    (ended,) = generator().generate([PROMPTS[0]], dataclasses.replace(GREEDY, stop_ids=(stop,)))
    first = whole.ids.index(stop)
    assert ended.ids == whole.ids[: first + 1]
    assert ended.finish_reason == "stop"
    assert ended.text == TOKENIZER.decode(whole.ids[:first]).rstrip("\ufffd")


def test_a_stop_text_ends_a_completion_and_is_cut_off():
    (whole,) = generator().generate([PROMPTS[0]], dataclasses.replace(GREEDY, max_new_tokens=30))
    letters = [i for i in range(1, 29) if whole.ids[i] < 128 and whole.ids[i + 1] < 128]
    assert letters, "the model writes no two letters in a row; take another seed"
    place = letters[0]
    stop = TOKENIZER.decode(whole.ids[place : place + 2])
    shown = []
    sampling = dataclasses.replace(GREEDY, max_new_tokens=30, stop=(stop,))
    (ended, other) = ordered(
        generator().generate(
            [PROMPTS[0], PROMPTS[1]], sampling, on_text=lambda prompt, sample, text: shown.append((prompt, text))
        )
    )
    assert (ended.finish_reason, len(ended.ids)) == ("stop", place + 2)
    assert ended.text == TOKENIZER.decode(whole.ids[:place])
    for completion in (ended, other):
        assert "".join(text for prompt, text in shown if prompt == completion.prompt) == completion.text


def test_repetition_ends_a_completion_that_has_been_certain_for_long():
    """With logits a thousand times as large every token is certain; 3,000 in MiniMax-M1, 5 here."""
    certain = Generator(CONFIG, params(), SETTINGS)
    certain.params["head"].set_value(1000 * certain.params["head"].get_value())
    sampling = Sampling(max_new_tokens=20, repetition_tokens=5)
    assert [(len(c.ids), c.finish_reason) for c in certain.generate(PROMPTS[:2], sampling)] == [(5, "repetition")] * 2
    (unlimited,) = certain.generate(PROMPTS[:1], dataclasses.replace(sampling, repetition_tokens=0))
    assert (len(unlimited.ids), unlimited.finish_reason) == (20, "length")
    unsure = generator().generate(PROMPTS[:1], sampling)
    assert [c.finish_reason for c in unsure] == ["length"]


FAST_LAYOUT = (1, 2, 2, 2)
SLOW_LAYOUTS = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 1, 2, 2), (1, 1, 4, 1)]


@pytest.mark.parametrize(
    "layout", [FAST_LAYOUT, *[pytest.param(each, marks=pytest.mark.slow) for each in SLOW_LAYOUTS]]
)
def test_every_layout_generates_the_same(layout):
    expected = ordered(generator().generate(PROMPTS, GREEDY))
    spread = generator(layout, slots=8)
    assert_same(ordered(spread.generate(PROMPTS, GREEDY)), expected)
    before = decoding.compilations()
    assert_same(
        ordered(spread.generate(PROMPTS[::-1], GREEDY))[::-1][0:1], [dataclasses.replace(expected[0], prompt=6)]
    )
    assert decoding.compilations() == before


def test_state_is_split_by_rows_and_heads():
    spread = generator(FAST_LAYOUT, slots=8)
    state = decoding.initial_state(spread.graphdef, spread.params, 8, 64)
    for leaf in jax.tree.leaves(state):
        layers, rows, heads, *rest = leaf.shape
        assert leaf.sharding.shard_shape(leaf.shape) == (layers, rows // 4, heads // 2, *rest)


def test_capacity_dispatch_drops_nothing_in_generation():
    dropping = dataclasses.replace(CONFIG, expert_dispatch="capacity", capacity_factor=0.1)
    assert_same(
        ordered(Generator(dropping, params(), SETTINGS).generate(PROMPTS, GREEDY)),
        ordered(generator().generate(PROMPTS, GREEDY)),
    )


def test_mistakes_have_their_lines():
    with pytest.raises(GenerationError, match=r"^slots: 6 do not divide over 4 batch shards; use 8$"):
        generator(FAST_LAYOUT, slots=6)
    with pytest.raises(GenerationError) as raised:
        Generator(CONFIG, params(), GenerationSettings(slots=0, capacity=0, prefill_tokens=10, decode_steps=-1))
    assert len(str(raised.value).splitlines()) == 4
    with pytest.raises(SamplingError, match=r"^top_p: 0 is no share"):
        generator().generate(PROMPTS, Sampling(max_new_tokens=1, top_p=0))
    with pytest.raises(GenerationError, match="texts cannot be found without a tokenizer"):
        Generator(CONFIG, params(), SETTINGS).generate(PROMPTS, Sampling(max_new_tokens=1, stop=("a",)))
    for prompt, message in (
        ([], r"^prompt 1: it has no tokens; begin it with the tokenizer's bos or eos token$"),
        ([1] * 60, r"^prompt 1: its 60 tokens and max_new_tokens=9 exceed the capacity of 64; .* to 69$"),
        ([3, 258], r"^prompt 1: token 258 is not in the vocabulary of 258$"),
        ([3, -1], r"^prompt 1: token -1 is not in the vocabulary of 258$"),
    ):
        with pytest.raises(GenerationError, match=message):
            list(generator().generate([PROMPTS[0], prompt], GREEDY))
