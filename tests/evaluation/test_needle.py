"""Needles: where they stand, how long prompts are, and both scores against the plain forward and greedy decoding."""

import numpy as np
import pytest
from tiny_evaluation import BOS, TOKENIZER, greedy_alone, log_probs_alone, scorer

from lightning_jax.errors import UserError
from lightning_jax.evaluation import NeedleSettings, make_trials, needle_in_a_haystack
from lightning_jax.evaluation import needle as needles
from lightning_jax.evaluation.needle import Haystack, Trial, make_trial

TEXTS = ["".join(f"This is line {n} of text {text}.\n" for n in range(40)) for text in range(3)]
SETTINGS = NeedleSettings(lengths=(400, 600), depths=(0, 50, 100), trials=2, distractors=3)


def trial_text(length, depth, number=0, settings=SETTINGS):
    trial = make_trial(Haystack(TEXTS, TOKENIZER), TOKENIZER, settings, length, depth, number)
    return trial, TOKENIZER.decode(trial.prompt)


@pytest.mark.parametrize("depth", [0, 25, 50, 100])
def test_a_prompt_has_its_length_and_the_needle_at_its_depth(depth):
    trial, text = trial_text(600, depth)
    assert len(trial.prompt) + len(trial.candidates[0]) == 600
    assert trial.prompt[0] == BOS
    needle = f"is {trial.answer}.\n"
    assert text.count(trial.answer) == 1
    at = text.index("\nThe secret number")
    end = text.index(needle) + len(needle)
    question = text.index("\nWhat is the secret number")
    # At the nearest border of a line.
    assert abs(at - depth / 100 * (question - (end - at))) <= 20
    assert at == 0 or at == question - (end - at) or text[at - 1] == "\n"
    assert text.endswith(" is")


def test_candidates_differ_and_the_first_is_the_answer():
    trial, _ = trial_text(400, 50)
    decoded = [TOKENIZER.decode(candidate) for candidate in trial.candidates]
    assert decoded[0] == f" {trial.answer}"
    assert len(set(decoded)) == 4


def test_trials_are_a_function_of_the_seed():
    def prompts(seed):
        settings = NeedleSettings((400,), (0, 50), seed=seed)
        return [trial_text(400, depth, number, settings)[1] for depth in (0, 50) for number in range(3)]

    assert prompts(0) == prompts(0)
    assert len(set(prompts(0) + prompts(1))) == 12


def test_a_length_without_room_and_a_haystack_too_small_have_their_lines():
    settings = NeedleSettings((20, 400, 100_000), (50,))
    with pytest.raises(UserError) as error:
        make_trials(TEXTS, TOKENIZER, settings)
    short, long = str(error.value).splitlines()
    assert short.startswith("needle: 20 tokens have no room for needle and question, which take ")
    assert " tokens are more than the haystack has, which are " in long


def test_settings_name_what_is_wrong():
    problems = NeedleSettings((0,), (101.0,), trials=0, distractors=0).problems()
    assert [problem.partition(":")[0] for problem in problems] == ["lengths", "depths", "trials", "distractors"]
    assert len(NeedleSettings((), ()).problems()) == 2
    assert not SETTINGS.problems()


def small_trials():
    """Prompts that fit the oracle; the first one's answer is what the model itself says."""
    dice = np.random.default_rng(0)
    trials = []
    for number in range(3):
        prompt = dice.integers(97, 123, 20 + number).astype(np.int32)
        candidates = [np.frombuffer(f" {value}".encode(), np.uint8).astype(np.int32) for value in (111, 222, 333)]
        trials.append(Trial(30, 50, prompt, candidates, "111"))
    greedy = np.array(greedy_alone(trials[0].prompt, 4), np.int32)
    answered = trials[0]._replace(candidates=[greedy, *trials[0].candidates], answer=TOKENIZER.decode(greedy).strip())
    return [answered, *trials[1:]]


def test_choice_is_the_likeliest_candidate_and_exact_match_is_greedy_decoding():
    trials = small_trials()
    choices = needles._choices(scorer(), trials)
    for (chosen, nats), trial in zip(choices, trials, strict=True):
        sums = [
            log_probs_alone([*trial.prompt, *each], len(trial.prompt))[0].sum(dtype=float) for each in trial.candidates
        ]
        assert chosen == (np.argmax(sums) == 0)
        assert nats == pytest.approx(-sums[0], abs=1e-4)
    assert choices[0][0]
    assert needles._exact_matches(scorer(), trials) == [True, False, False]


def test_cells_are_shares_of_their_trials(monkeypatch):
    asked = []

    def choices(scorer, trials):
        asked.extend(trials)
        return [(trial.depth == 50 and number % 2 == 0, trial.depth) for number, trial in enumerate(trials)]

    monkeypatch.setattr(needles, "_choices", choices)
    monkeypatch.setattr(needles, "_exact_matches", lambda scorer, trials: [trial.length == 600 for trial in trials])
    trials = make_trials(TEXTS, TOKENIZER, SETTINGS)
    result = needle_in_a_haystack(scorer(), [*trials[400], *trials[600]])
    assert len(asked) == 12
    cells = {(each["length"], each["depth"]): each for each in result["cells"]}
    assert list(cells) == [(length, depth) for length in (400, 600) for depth in (0, 50, 100)]
    for (length, depth), cell in cells.items():
        assert cell["choice"] == (0.5 if depth == 50 else 0)
        assert cell["exact_match"] == (length == 600)
        assert cell["answer_nats"] == depth
