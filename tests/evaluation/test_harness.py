"""The harness's three requests against the plain forward and greedy decoding; and a task of the harness itself."""

import json

import numpy as np
import pytest
from tiny_evaluation import BOS, EOS, greedy_alone, log_probs_alone, scorer

from lightning_jax.errors import UserError
from lightning_jax.evaluation import TextModel, run_tasks
from lightning_jax.evaluation.harness import problems_of_tasks

GREEDY = {"do_sample": False, "temperature": 0.0}


def model(context_length=64):
    return TextModel(scorer(), context_length)


def greedy(text, tokens):
    return greedy_alone([BOS, *text.encode()], tokens)


def decoded(ids):
    return bytes(token for token in ids if token < 256).decode(errors="replace").rstrip("\ufffd")


def test_log_likelihoods_are_those_of_a_plain_forward():
    pairs = [("alpha", " beta"), ("alpha ", "beta"), ("", "alpha"), ("a", "é"), ("the cat sat on the", " mat")]
    for (context, continuation), (value, is_greedy) in zip(pairs, model().log_likelihoods(pairs), strict=True):
        ids = [BOS, *(context + continuation).encode()]
        log_probs, likeliest = log_probs_alone(ids, 1 + len(context.rstrip().encode()))
        assert value == pytest.approx(log_probs.sum(dtype=np.float64), abs=1e-4)
        assert is_greedy == likeliest.all()


def test_the_greedy_flag_is_set_for_the_greedy_continuation():
    contexts = ["alpha", "beta", "gamma delta", "epsilon", "zeta", "eta", "theta"]
    texts = [(context, bytes(ids).decode("ascii")) for context in contexts if max(ids := greedy(context, 2)) < 128]
    assert texts, "no context has a greedy continuation that is text; choose others"
    assert all(is_greedy for _, is_greedy in model().log_likelihoods(texts))
    assert not any(is_greedy for _, is_greedy in model().log_likelihoods([(a, b + "!?") for a, b in texts]))


def test_a_context_that_is_too_long_loses_its_beginning():
    context = "one two three four five six seven"
    ((value, _),) = model(16).log_likelihoods([(context, " eight")])
    ids = [*(context + " eight").encode()][-17:]
    assert value == pytest.approx(log_probs_alone(ids, 17 - 6)[0].sum(dtype=np.float64), abs=1e-4)
    with pytest.raises(UserError, match="a continuation of 17 tokens cannot be scored in a context of 16"):
        model(16).log_likelihoods([("a", " " + 16 * "b")])


def test_rolling_windows_are_the_harness_s():
    texts = ["short", "one two three four five six seven eight", "exactly sixteen!"]
    for text, value in zip(texts, model(16).rolling_log_likelihoods(texts), strict=True):
        ids, expected = [BOS, *text.encode()], 0.0
        for first in range(1, len(ids), 16):
            end = min(first + 16, len(ids))
            begin = max(end - 17, 0)
            expected += log_probs_alone(ids[begin:end], first - begin)[0].sum(dtype=np.float64)
        assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_generation_ends_at_until_at_eos_and_at_its_length():
    contexts = ["alpha", "the cat sat on the", "b"]
    whole = [decoded(greedy(context, 6)) for context in contexts]
    settings = GREEDY | {"max_gen_toks": 6}
    assert model().generate_until([(context, settings) for context in contexts]) == whole
    stops = [text[1] for text in whole]
    requests = [(context, settings | {"until": [stop]}) for context, stop in zip(contexts, stops, strict=True)]
    expected = [text[: text.index(stop)] for text, stop in zip(whole, stops, strict=True)]
    assert model().generate_until(requests) == expected
    assert model().generate_until([(contexts[0], settings | {"until": stops[0]})]) == expected[:1]


def test_a_prompt_is_cut_at_the_left_to_leave_room():
    text = "one two three four five six seven"
    (generated,) = model(24).generate_until([(text, GREEDY | {"max_gen_toks": 4})])
    ids = [*text.encode()][-20:]
    assert generated == decoded(greedy_alone(ids, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 64}, "max_gen_toks=64 leaves no room for a prompt in a context of 64 tokens"),
        ({"beams": 4}, "generation_kwargs: beams: not known"),
        ({"do_sample": True, "top_p": 2.0}, "generation_kwargs: top_p: 2.0 is no share"),
    ],
)
def test_settings_that_cannot_be_have_their_line(settings, message):
    with pytest.raises(UserError, match=message):
        model().generate_until([("a", {"max_gen_toks": 4} | settings)])


def test_sampling_is_asked_for_by_a_temperature():
    sampling = model()._sampling
    assert sampling({"until": ["\n"]}).temperature == 0
    assert sampling({"temperature": 0.5}).temperature == 0.5
    assert sampling({"do_sample": True}).temperature == 1
    assert sampling({"do_sample": False, "temperature": 0.5}).temperature == 0
    assert sampling({}).stop_ids == (EOS,)
    assert sampling({"max_new_tokens": 7}).max_new_tokens == 7


QUESTIONS = [
    {"question": "alpha", "choices": ["one", "two", "three"], "gold": 1},
    {"question": "beta", "choices": ["four", "five", "six"], "gold": 0},
]
KINDS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}]
""",
    "generated": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture
def task_files(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    files = []
    for kind, task in KINDS.items():
        head = f"task: toy_{kind}\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'data.jsonl'}}}\n"
        files.append(tmp_path / f"{kind}.yaml")
        files[-1].write_text(head + "test_split: train" + task)
    return list(map(str, files))


@pytest.mark.slow
def test_tasks_of_the_harness_run_from_local_files(task_files):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    said = []
    results = run_tasks(model(), task_files, num_fewshot=None, limit=None, say=said.append)["results"]
    right = 0
    for each in QUESTIONS:
        sums = [
            log_probs_alone([BOS, *f"{each['question']} {choice}".encode()], 1 + len(each["question"]))[0].sum()
            for choice in each["choices"]
        ]
        right += np.argmax(sums) == each["gold"]
    assert results["toy_choices"]["acc,none"] == right / 2
    assert results["toy_generated"]["exact_match,none"] == 0
    nats = -sum(log_probs_alone([BOS, *each["question"].encode()], 1)[0].sum(dtype=np.float64) for each in QUESTIONS)
    assert results["toy_rolling"]["bits_per_byte,none"] == pytest.approx(nats / 9 / np.log(2), rel=1e-5)
    assert said == [f"lm-evaluation-harness: {', '.join(task_files)}"]


def test_a_task_that_the_harness_cannot_load_has_its_line(task_files, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    (tmp_path / "broken.yaml").write_text("task: broken\noutput_type: [\n")
    assert problems_of_tasks([*task_files, "missing.yaml"]) == ["missing.yaml: there is no such file"]
    with pytest.raises(UserError) as error:
        run_tasks(model(), [str(tmp_path / "broken.yaml")], num_fewshot=None, limit=None, say=print)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{tmp_path / 'broken.yaml'}: the harness cannot load it: ")


def test_without_the_harness_its_tasks_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert problems_of_tasks(["a.yaml", "arc_easy"]) == [
        "a.yaml, arc_easy: tasks of lm-evaluation-harness need it: pip install lm_eval"
    ]
    assert problems_of_tasks([]) == []
